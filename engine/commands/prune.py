"""`engine prune`: a shallower model as an ordinary Hugging Face directory."""

from pathlib import Path
from typing import Annotated

import typer

from engine.commands import common


def prune(
    model: Annotated[str, typer.Argument(help="Directory, .gguf file or hub id.")],
    out: Annotated[Path, typer.Argument(help="A new directory.")],
    plan_path: common.PlanFile = None,
    drop: common.Drop = None,
    keep: common.Keep = None,
    dtype: Annotated[
        str | None, typer.Option(help="The source's own 16-bit one if not given.")
    ] = None,
) -> None:
    """Write the shallower model as an ordinary Hugging Face directory."""
    from engine.api import choose_layers, parse_dtype
    from engine.checkpoint import open_checkpoint
    from engine.checkpoint.locate import locate
    from engine.export.hf import prune as write

    path = locate(model)
    checkpoint = open_checkpoint(path)
    chosen = drop if plan_path is None else common.planned(plan_path, drop, keep)
    config = choose_layers(checkpoint, chosen, keep)
    with common.progress("bytes") as progress:
        write(
            checkpoint,
            config,
            out,
            dtype=parse_dtype(dtype) if dtype else None,
            progress=progress,
        )
    print(f"{out}: {len(config.layers)} of {config.total_layers} layers")
