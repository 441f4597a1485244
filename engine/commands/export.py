"""`engine export`: a model, quantized or not, for other engines to open."""

from pathlib import Path
from typing import Annotated

import typer

from engine.commands import common, output


def export(
    model: common.ModelArgument,
    out: Annotated[Path, typer.Argument(help="A new directory; a new .gguf file for gguf.")],
    to: Annotated[
        str,
        typer.Option(
            metavar="FORMAT",
            help="compressed-tensors (vLLM, SGLang, transformers), gptq, gguf (llama.cpp, ollama) "
            "or hf, 16 bits.",
        ),
    ],
    plan: common.PlanFile = None,
    drop: common.Drop = None,
    keep: common.Keep = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Dtype of what is not quantized. Default: as stored; hf: 16 bits."),
    ] = None,
) -> None:
    """Export a model to the format of another engine, in its own bits or in 16 (hf)."""
    from engine.checkpoint import choose_layers
    from engine.runtime import check_backend

    check_backend(None, dtype)
    chosen = common.dropped(plan, drop, keep)
    _, checkpoint = common.open_checkpoint(model)
    config = choose_layers(checkpoint, chosen, keep)
    from engine.export.formats import export as write
    from engine.kernels.dtypes import dtype_of

    with output.progress("export") as progress:
        write(
            checkpoint,
            config,
            out,
            to,
            dtype=None if dtype is None else dtype_of(dtype),
            progress=progress,
        )
    output.say(f"{out}: {len(config.layers)} of {config.total_layers} layers, {to}")
