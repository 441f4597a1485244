"""`engine prune`: a shallower model in the format and the bits that it has."""

from pathlib import Path
from typing import Annotated

import typer

from engine.commands import common, output


def prune(
    model: common.ModelArgument,
    out: Annotated[Path, typer.Argument(help="A new directory; a new .gguf file of a GGUF.")],
    plan: common.PlanFile = None,
    drop: common.Drop = None,
    keep: common.Keep = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="For an unquantized directory. Default: its own 16-bit dtype, else float16."
        ),
    ] = None,
) -> None:
    """Drop layers; the output keeps format and bits: a directory, quantized or not, or a GGUF."""
    checkpoint, config, stored = common.open_to_write(model, plan, drop, keep, dtype)
    from engine.export.formats import prune as write

    with output.progress("prune") as progress:
        write(checkpoint, config, out, dtype=stored, progress=progress)
    output.say(f"{out}: {len(config.layers)} of {config.total_layers} layers")
