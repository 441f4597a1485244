"""What `engine shrink` has made, from the records that it kept: its page's contents, its table."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.artifacts import RECORDS
from engine.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from engine.benchmark.speed import RunRecord
    from engine.report.shrunk import Shrunk

RECORD = "shrink.json"  # of the run, in OUT


def collect(model: str, path: Path, packed: Path) -> "Shrunk":
    """What a page needs, from the records in `packed`."""
    from engine.artifacts import HealRecord, Plan, Profile
    from engine.benchmark.speed import RunRecord
    from engine.checkpoint.files import read_json
    from engine.commands.budget import read_model, usual_context
    from engine.judgement import Judgement
    from engine.pruning.budget import Storage, budget, file_bytes
    from engine.report.shrunk import Shrunk

    records = packed / RECORDS
    plan = Plan.load(records / "plan.json")
    config, sizes = read_model(model)
    how = read_json(packed / "config.json")["quantization_config"]
    storage = Storage.of(*(how.get(name) for name in ("bits", "group", "scheme", "head", "v")))
    file = None if sizes is None else file_bytes(config, sizes)
    cost = budget(model, config, config.keep(plan.keep), storage, usual_context(config), file)
    was, now = (RunRecord.load(records / f"{name}-speed.json") for name in ("before", "after"))
    counts = [f"{side['total_parameters']:,}" for side in (cost.before, cost.after)]
    return Shrunk(
        model=model,
        profile=Profile.load(records / "profile.json"),
        plan=plan,
        healing=HealRecord.load(records / "heal.json"),
        budget=cost,
        before=Judgement.load(records / "before.json"),
        after=Judgement.load(records / "after.json"),
        sizes=[
            ("layers", str(plan.total_layers), str(len(plan.keep))),
            ("parameters", counts[0], counts[1]),
            ("weights on disk", _mb(_weights(path)), _mb(_weights(packed))),
            ("weights in memory", _mb(was.weight_bytes), _mb(now.weight_bytes)),
        ],
        speeds=speed_rows(was, now),
        conditions=f"{now.device_name}, {now.threads} threads: {now.prompt_tokens} tokens in, "
        f"{now.new_tokens} out, batch 1",
    )


def speed_rows(was: "RunRecord", now: "RunRecord") -> list[tuple[str, str, str]]:
    def row(name: str, field: str, unit: str) -> tuple[str, str, str]:
        cells = [getattr(record, field) for record in (was, now)]
        before, after = ("-" if cell is None else f"{cell:,.1f} {unit}" for cell in cells)
        return name, before, after

    return [
        row("prefill", "prefill_tok_s", "tok/s"),
        row("decode", "decode_tok_s", "tok/s"),
        row("time to first token", "ttft_ms", "ms"),
        ("computed by", f"{was.backend}, {was.dtype}", f"{now.backend}, {now.dtype}"),
    ]


def table(out: Path) -> "Table":
    """What it was and is."""
    from rich.table import Table

    from engine.artifacts import read_raw

    rows = read_raw(out / RECORD).get("rows")
    if not isinstance(rows, list) or not all(_is_row(row) for row in rows):
        raise InputError(f"{out / RECORD}: expected rows of three texts, found {rows!r:.40}")
    table = Table("", "it was", "it is", pad_edge=False)
    for row in rows:
        table.add_row(*row)
    return table


def _is_row(row: Any) -> bool:
    return isinstance(row, list) and len(row) == 3 and all(isinstance(each, str) for each in row)


def _weights(path: Path) -> int:
    from engine.checkpoint.adapter import weight_files

    return sum(file.stat().st_size for file in weight_files(path))


def _mb(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"
