"""The model card of a shallower model, from the records that its making left."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.architecture.layers import format_layers
from engine.artifacts import HEAL, RECORDS, HealRecord, Plan
from engine.checkpoint import Checkpoint, open_checkpoint
from engine.checkpoint.adapter import CONFIG as ADAPTER
from engine.checkpoint.gguf import GgufCheckpoint
from engine.checkpoint.weights import describe, layer_weights
from engine.errors import InputError
from engine.export.packed import PLAN
from engine.judgement import Judgement

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*", re.ASCII)  # a licence, as metadata name it


@dataclass(frozen=True)
class Made:
    """What is known of how a model was made."""

    path: Path
    layers: int
    matrices: tuple[str, ...]  # what those of a layer are stored as
    nbytes: int  # of the weights on disk
    plan: Plan | None
    heal: HealRecord | None
    scales: HealRecord | None  # learnt behind it, once the model was packed
    records: tuple[Judgement, ...]  # from the whole model to this one
    source: str | None
    licence: str

    @property
    def keep(self) -> tuple[int, ...] | None:
        record = self.plan or self.heal
        return None if record is None else record.keep


def gather(
    path: Path,
    *,
    plan: Path | None = None,
    records: Sequence[Judgement] = (),
    source: str | None = None,
    licence: str | None = None,
) -> Made:
    """Reads what lies in the directory, or the GGUF, and what is given besides.

    InputError for records of other texts than each other's, for a last one of another number of
    layers, and where the licence of the source is not known.
    """
    if (path / ADAPTER).is_file():
        raise InputError(
            f"{path}: an adapter, whose base the hub would not hold beside it; push the model that "
            "`engine heal` writes without --adapter"
        )
    checkpoint = open_checkpoint(path)
    for judged in records:
        if _windows(judged) != _windows(records[0]):
            raise InputError(
                f"{judged.model}: its record is of other texts or windows than "
                f"{records[0].model}'s; they do not compare"
            )
    planned = plan or (path / PLAN if (path / PLAN).is_file() else None)
    found = Plan.load(planned) if planned is not None else None
    healed, learnt = path / RECORDS / HEAL, path / HEAL  # of `engine shrink` both
    if not healed.is_file():
        healed, learnt = learnt, healed
    heal, scales = (HealRecord.load(file) if file.is_file() else None for file in (healed, learnt))
    layers = checkpoint.config.total_layers
    for where, record in ((planned, found), (healed, heal), (learnt, scales)):
        if record is not None and len(record.keep) != layers:
            raise InputError(f"{where}: keeps {len(record.keep)} layers, and {path} has {layers}")
    if records and records[-1].layers_kept != layers:
        raise InputError(
            f"{records[-1].model}: the last record is of {records[-1].layers_kept} layers, and "
            f"{path} has {layers}"
        )
    named = source or next((record.model for record in (found, heal) if record is not None), None)
    if licence is not None and not _WORD.fullmatch(licence):
        raise InputError(f"license: expected one word, like apache-2.0, found {licence!r:.80}")
    known = licence or _licence(checkpoint) or _licence_of(named)
    if known is None:
        raise InputError(
            f"{path}: the licence of {named or 'its source'} is not known; name it with --license"
        )
    first = layer_weights(checkpoint, checkpoint.config, checkpoint.config.layers[0].layer)
    kinds = dict.fromkeys(describe(stored) for _, stored in first if len(stored.shape) == 2)
    nbytes = sum(checkpoint.nbytes(name) for name in checkpoint.names())
    return Made(
        path, layers, tuple(kinds), nbytes, found, heal, scales, tuple(records), named, known
    )


def card(made: Made, repo: str) -> str:
    """README.md, with the metadata that the Hub reads in front."""
    head = ["---", f"license: {made.licence}", "pipeline_tag: text-generation"]
    if made.source is not None and _REPO.fullmatch(made.source) and not Path(made.source).exists():
        head.append(f"base_model: {made.source}")
    head += ["tags:", "- shallow", "- layer-pruning", "---", ""]
    lines = [f"# {repo.rpartition('/')[2]}", "", _summary(made), ""]
    if made.plan is not None:
        lines += [f"The layers were chosen by the rule `{_plain(made.plan.rule)}`.", ""]
    if made.heal is not None:
        lines += [_healed(made.heal), ""]
    if made.scales is not None:
        lines += ["Its scales have learnt once more after it was quantized.", ""]
    if made.records:
        lines += _judged(made.records)
    lines.append("Made with Shallow: `engine run MODEL` opens it.")
    return "\n".join(head + lines) + "\n"


def _summary(made: Made) -> str:
    stored = ", ".join(made.matrices)
    size = f"matrices as {stored}; {made.nbytes / 1e6:,.1f} MB of weights"
    source = "The source model" if made.source is None else f"`{_plain(made.source)}`"
    record = made.plan or made.heal
    if record is None or made.keep is None:  # how many the source has is not known
        of = "" if made.source is None else f" of {source}"
        return f"{made.layers} layers{of}, {size}."
    if len(made.keep) == record.total_layers:
        return f"{source} with all of its {made.layers} layers, {size}."
    dropped = [layer for layer in range(record.total_layers) if layer not in made.keep]
    return (
        f"{source} without layers {format_layers(dropped)} (numbered from 0, inclusive): "
        f"{made.layers} of {record.total_layers} stay; {size}."
    )


def _healed(heal: HealRecord) -> str:
    # What is fitted takes no steps, and its minutes are not recorded.
    took = f" ({heal.steps} steps, {heal.minutes:.1f} minutes)" if heal.steps else ""
    return (
        f"Healed by {', '.join(heal.methods)}{took} from `{_plain(heal.teacher)}`: perplexity on "
        f"held-out text {heal.perplexity_before:.2f} before and {heal.perplexity_after:.2f} after."
    )


def _judged(records: Sequence[Judgement]) -> list[str]:
    rows = ["| model | layers | perplexity |", "|---|---|---|"]
    rows += [
        f"| {_cell(record.model)} | {record.layers_kept} of {record.layers_total} | "
        f"{record.perplexity:.2f} |"
        for record in records
    ]
    texts = list(map(_plain, records[-1].texts))
    mean = "; the geometric mean of these texts" if len(texts) > 1 else ""
    return [*rows, "", f"Perplexity on {', '.join(texts)}{mean}.", ""]


def _plain(text: str) -> str:
    """Without what would end a line or a code span of Markdown."""
    return " ".join(text.replace("`", "'").split())


def _cell(text: str) -> str:
    """The same without what would end a cell of a table."""
    return _plain(text).replace("|", r"\|")


def _windows(record: Judgement) -> list[str]:
    return [each.text_hash for each in record.texts.values()]


def _licence(checkpoint: Checkpoint) -> str | None:
    """What a GGUF or the README of a directory says."""
    if isinstance(checkpoint, GgufCheckpoint):
        said = checkpoint.file.metadata.get("general.license")
        return said if isinstance(said, str) and _WORD.fullmatch(said) else None
    readme = checkpoint.path / "README.md"
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    for line in text.splitlines():
        if line.startswith("license:"):
            said = line.removeprefix("license:").strip().strip("'\"")
            return said if _WORD.fullmatch(said) else None
    return None


def _licence_of(source: str | None) -> str | None:
    """The same of the source, where it lies here."""
    from engine.checkpoint.fetch import DEFAULT, cached

    path = cached(DEFAULT) if source == DEFAULT.name else Path(source) if source else None
    if path is None or not path.exists():
        return None
    return _licence(open_checkpoint(path))
