"""`engine budget`: what dropping layers and bits saves, as a table and as JSON."""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engine.commands import common, output
from engine.errors import InputError, check_choice

if TYPE_CHECKING:
    from engine.architecture.config import ModelConfig
    from engine.pruning.budget import Budget

LLAMA = "llama-2-70b"
CONTEXT = 4096
GROUP = 64
_UNITS = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
# Section 1 of arXiv 2403.17887: 140 GB and 3e10 FLOPs a token become 17.5 GB and 1.5e10.
_PAPER = {"before_gb": 140.0, "after_gb": 17.5, "before_flops": 3e10, "after_flops": 1.5e10}


def budget(
    model: Annotated[
        str,
        typer.Argument(
            help="A model, a config.json, or a built-in shape: llama-2-7b, llama-2-13b, "
            "llama-2-70b, llama-3-8b, llama-3-70b, mistral-7b, qwen-7b, qwen-14b, phi-2."
        ),
    ] = LLAMA,
    plan: common.PlanFile = None,
    drop: common.Drop = None,
    keep: common.Keep = None,
    bits: Annotated[int, typer.Option(help="Bits of the layers' matrices: 4, 8 or 16.")] = 4,
    group: Annotated[int, typer.Option(help="Weights that share a scale; 0: a row.")] = GROUP,
    head: Annotated[
        int, typer.Option(help="Bits of the head: 4, 8 or 16; 8 is quantize's default.")
    ] = 16,
    v: Annotated[
        int | None,
        typer.Option(help="Bits of v_proj. Default: --bits; quantize may make 8 of it, see there."),
    ] = None,
    minimum: Annotated[
        bool, typer.Option("--minimum", help="Groups store a minimum beside the scale.")
    ] = False,
    context: Annotated[
        int | None, typer.Option(help=f"Positions in the KV cache. Default: up to {CONTEXT}.")
    ] = None,
    bandwidth: Annotated[
        float | None,
        typer.Option(
            metavar="GB/S", help="Memory bandwidth, for the upper bound of tok/s that it allows."
        ),
    ] = None,
    paper: Annotated[
        bool,
        typer.Option(
            "--paper", help="Compare the paper's claim for Llama-2-70B with an itemised count."
        ),
    ] = False,
    json_file: common.JsonFile = None,
    called: typer.Context = None,  # type: ignore[assignment]  # typer fills it in
) -> None:
    """Parameters, bytes and FLOPs of a model, before and after; needs no weights."""
    from engine.pruning.budget import Storage, file_bytes
    from engine.pruning.budget import budget as compute

    common.check_writable(json_file, reads=(model, plan))
    if paper:
        if (model, plan, drop, keep) != (LLAMA, None, None, None):
            raise InputError(
                f"paper: is about {LLAMA} without 39-78 alone; leave MODEL and layers out"
            )
        drop = "39-78"  # half of 80 layers, all but the last of the end
    if {bits, head, v or bits} == {16}:
        output.leave_out(called, ("group", "minimum"), "has no effect at 16 bits, which have none")
    check_group(group)
    config, sizes = read_model(model)
    storage = Storage.of(bits, group, "minimum" if minimum else "symmetric", head, v)
    kept = kept_config(config, plan, drop, keep, model)
    file = None if sizes is None else file_bytes(config, sizes)
    positions = usual_context(config) if context is None else context
    found = compute(model, config, kept, storage, positions, file)

    def tables() -> None:
        show(found, bandwidth)
        if paper:
            show_paper(found)

    common.hand_out(found, json_file, tables)


def usual_context(config: "ModelConfig") -> int:
    """Positions in the KV cache where nobody says how many."""
    return min(CONTEXT, config.max_context)


def check_group(group: int) -> None:
    """InputError for groups that no quantized matrix has."""
    if group != GROUP:  # else there is nothing to ask of torch, which takes a second to import
        from engine.kernels.w4.format import GROUPS

        check_choice("group", group, GROUPS)


def kept_config(
    config: "ModelConfig", plan: Path | None, drop: str | None, keep: str | None, model: str
) -> "ModelConfig":
    """The layers that a plan, --drop or --keep leave; a plan of another shape is refused."""
    from engine.architecture.layers import kept_layers

    chosen = common.dropped(plan, drop, keep)
    if chosen is None or isinstance(chosen, str):
        return config.keep(kept_layers(config.total_layers, chosen, keep))
    chosen.check(config.architecture_hash, config.total_layers, model)
    return config.keep(chosen.keep)


def read_model(ref: str) -> "tuple[ModelConfig, dict[str, int] | None]":
    """(config, bytes of every tensor on disk) of a checkpoint, of which headers alone are read.

    A built-in shape, a config.json and a directory without weights have no bytes: None.
    """
    from engine.architecture.hf_config import from_hf
    from engine.checkpoint import stored_sizes
    from engine.checkpoint.files import read_json
    from engine.checkpoint.locate import locate
    from engine.pruning.budget import built_in

    if (found := built_in(ref)) is not None:
        return found, None
    path = Path(os.path.expanduser(ref))
    if path.is_dir() and not list(path.glob("*.safetensors")):
        path = path / "config.json"
    if path.suffix == ".json":
        return from_hf(read_json(path), str(path)), None
    return stored_sizes(locate(ref))


def parse_bytes(size: str) -> int:
    """ "8GB" or "7.5GiB" -> bytes."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*([kmgt]i?b)", size.strip().lower())
    if not match:
        raise InputError(f"target-memory: expected a size like 8GB or 500MB, found {size!r}")
    return int(float(match[1]) * _UNITS[match[2]])


def show(found: "Budget", bandwidth: float | None) -> None:
    """The itemised table; bytes in MB or GB (1e9)."""
    from rich.table import Table

    from engine.report.tables import BUDGET_COLUMNS, budget_rows

    table = Table(*BUDGET_COLUMNS, title=found.model)
    for column in table.columns[1:]:
        column.justify = "right"
    for section in budget_rows(found, bandwidth):
        for row in section:
            table.add_row(*row)
        table.add_section()
    output.show(table)


def show_paper(found: "Budget") -> None:
    """The paper's own arithmetic beside the itemised count."""
    before, after = found.before, found.after
    sixteen, four = 2 * 70e9 / 1e9, 2 * 70e9 / 4 / 2 / 1e9
    rule = 2 * before["total_parameters"]
    output.say(
        f"The paper (arXiv 2403.17887): {_PAPER['before_gb']:g} GB -> {_PAPER['after_gb']:g} GB, "
        f"{_PAPER['before_flops']:.1e} -> {_PAPER['after_flops']:.1e} FLOPs a token.\n"
        f"Its bytes are 70e9 parameters at 16 bits, {sixteen:g} GB, and a quarter of the bits of "
        f"half of them, {four:g} GB. Itemised: {before['total_weight_bytes'] / 1e9:.1f} GB -> "
        f"{after['total_weight_bytes'] / 1e9:.1f} GB, since embedding and head do not shrink with "
        f"the layers and groups carry scales.\n"
        f"Its FLOPs halve, which is right; their absolute value is not: 2 x parameters gives "
        f"{rule:.2e} a token before, {rule / _PAPER['before_flops']:.1f} times as many. "
        f"With attention over {found.context:,} positions: {before['flops_per_token']:.2e} -> "
        f"{after['flops_per_token']:.2e}."
    )
