"""`engine quantize`: a model in 4 bits, as a directory that every backend opens."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine.commands import common, output
from engine.errors import InputError

if TYPE_CHECKING:
    from engine.export.packed import Entry
    from engine.quantize.recipe import Recipe

SAMPLES = 128  # at most, where --samples does not say
LENGTH = 512  # tokens a sample
WHY = {  # a scheme was chosen; measured in benchmarks/results/quality.md
    "codebook": "codebook has the lowest loss in groups of this size; for exports to gptq and "
    "compressed-tensors use --scheme symmetric",
    "minimum": "minimum has the lowest loss in groups this small; for exports to gptq and "
    "compressed-tensors use --scheme symmetric",
}

_CALIBRATION = "Calibration of gptq"


def quantize(
    model: common.ModelArgument,
    out: Annotated[Path, typer.Argument(help="A new directory.")],
    method: Annotated[
        str | None,
        typer.Option(
            help="gptq, hqq, rtn, nf4; or keep: a quantized source's bits as they are. Default: "
            "gptq; keep for a quantized source if no other option asks for a change."
        ),
    ] = None,
    bits: Annotated[int | None, typer.Option(help="4 or 8. Default: 4.")] = None,
    group: Annotated[
        int | None,
        typer.Option(help="Weights that share a scale: 16 to 128; 0: a row. Default: 64."),
    ] = None,
    scheme: Annotated[
        str | None,
        typer.Option(
            help="symmetric, zero, minimum or codebook (IQ4_NL's). Default: codebook with gptq, "
            "but minimum in groups of 16 and 32 and symmetric in 8 bits; minimum with hqq; "
            "symmetric with rtn."
        ),
    ] = None,
    scale_dtype: Annotated[
        str | None,
        typer.Option(help="Dtype of the scales: float16, bfloat16, float32. Default: float16."),
    ] = None,
    clip: Annotated[
        str | None,
        typer.Option(help="Range of a group in rtn and gptq: minmax or mse. Default: mse in gptq."),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(
            help="Bits of the head: 4, 8, 16 or keep. Default: 8, but keep with --method keep."
        ),
    ] = None,
    v: Annotated[
        int | None,
        typer.Option(
            help="Bits of v_proj, the most sensitive matrix: 4 or 8. Default: 8 with gptq's "
            "codebook in grouped-query attention, else --bits."
        ),
    ] = None,
    act_order: Annotated[
        bool, typer.Option("--act-order", help="gptq: activation order (desc_act).")
    ] = False,
    plan: common.PlanFile = None,
    drop: common.Drop = None,
    keep: common.Keep = None,
    text: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            rich_help_panel=_CALIBRATION,
            help="Text file or directory, .jsonl, .parquet or hub:NAME. Default: built-in prose, "
            "handbook and code.",
        ),
    ] = None,
    column: Annotated[
        str,
        typer.Option(
            rich_help_panel=_CALIBRATION, help="Column of a .jsonl, .parquet or hub source."
        ),
    ] = "text",
    samples: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=_CALIBRATION, help=f"Number of samples. Default: up to {SAMPLES}."
        ),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(rich_help_panel=_CALIBRATION, help=f"Tokens a sample. Default: {LENGTH}."),
    ] = None,
    threads: common.Threads = None,
) -> None:
    """Quantize a model a layer at a time; an interrupted run resumes."""
    asked = {"method": method, "bits": bits, "group": group, "scheme": scheme, "clip": clip}
    asked |= {"scale_dtype": scale_dtype, "act_order": act_order or None, "head": head, "v": v}
    asked = {name: value for name, value in asked.items() if value is not None}

    from engine.checkpoint import choose_layers
    from engine.text import load_text, mixed_text
    from engine.text.samples import COLUMN, check_column, read_samples

    chosen = common.dropped(plan, drop, keep)
    recipe = as_recipe(asked)  # refused before anything is downloaded
    path, checkpoint = common.open_checkpoint(model)
    config = choose_layers(checkpoint, chosen, keep)
    from engine.checkpoint.weights import is_quantized
    from engine.quantize.packing import pack, plan_of

    common.set_threads(threads)
    if not asked and is_quantized(checkpoint):
        recipe = as_recipe({"method": "keep"})
    recipe = recipe.of(config)
    named = None if column == COLUMN else column
    calibration = {"text": text, "column": named, "samples": samples, "length": length}
    tokens: list[list[int]] = []
    if recipe.method == "gptq":
        check_column([text], column)
        common.check_outside(out, text)
        tokens, _ = read_samples(
            text,
            load_text(path),
            LENGTH if length is None else length,
            count=samples,
            most=SAMPLES,
            column=column,
            built_in=mixed_text,
        )
    elif given_for := [name for name, value in calibration.items() if value is not None]:
        anew = "; --method gptq quantizes anew" if recipe.method == "keep" else ""
        raise InputError(f"{given_for[0]}: calibrates gptq, not {recipe.method}{anew}")
    with output.progress("files") as progress:
        entries = pack(
            checkpoint,
            config,
            out,
            recipe,
            tokens,
            plan=plan_of(checkpoint, config, model, None if isinstance(chosen, str) else chosen),
            progress=progress,
        )
    show(entries)
    layers = f"{len(config.layers)} of {config.total_layers} layers"
    output.say(f"{out}: {layers}, {outcome(recipe, entries, 'scheme' not in asked)}")


def as_recipe(asked: dict[str, Any]) -> "Recipe":
    """A Recipe from the options that are given; the others depend on the method."""
    asked = dict(asked)
    if asked.get("method") == "keep":
        extra = sorted(asked.keys() - {"method", "head"})
        if extra:
            raise InputError(f"{extra[0].replace('_', '-')}: has no effect with --method keep")
        asked.setdefault("head", "keep")
    if (head := asked.get("head")) is not None:
        if head not in ("4", "8", "16", "keep"):
            raise InputError(f"head: expected 4, 8, 16 or keep, found {head!r}")
        asked["head"] = None if head == "keep" else int(head)
    from engine.quantize.recipe import Recipe

    return Recipe(**asked)


def outcome(recipe: "Recipe", entries: list["Entry"], by_default: bool) -> str:
    """How the matrices are stored, the bits that take them, and why where nobody asked for it."""
    if recipe.method == "keep":
        return "keep"
    from engine.checkpoint.weights import describe_spec

    made = [entry for entry in entries if entry.in_layers]
    bits = 8 * sum(entry.nbytes for entry in made) / sum(entry.weights for entry in made)
    said = f"{recipe.method}: {describe_spec(recipe.spec)}, "
    said += "" if recipe.v == recipe.bits else f"v in {recipe.v} bits, "
    said += f"{bits:.2f} bits a weight"
    if by_default and recipe.method == "gptq" and recipe.scheme in WHY:
        return f"{said}, {WHY[recipe.scheme]}"
    return said


def show(entries: list["Entry"]) -> None:
    """What became of every kind of tensor."""
    from rich.table import Table

    table = Table("tensors", "count", "from", "to", "bits a weight", "MB")
    for entry in entries:
        table.add_row(
            ", ".join(entry.kinds),
            str(entry.count),
            entry.source,
            entry.stored if entry.stored != entry.source else "as it was",
            f"{8 * entry.nbytes / entry.weights:.2f}",
            f"{entry.nbytes / 1e6:,.1f}",
        )
    weights, nbytes = (sum(getattr(e, name) for e in entries) for name in ("weights", "nbytes"))
    table.add_section()
    table.add_row("all", "", "", "", f"{8 * nbytes / weights:.2f}", f"{nbytes / 1e6:,.1f}")
    output.show(table)
