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
    checkpoint, config, stored = common.open_to_write(model, plan, drop, keep, dtype)
    from engine.export.formats import export as write

    with output.progress("export") as progress:
        write(checkpoint, config, out, to, dtype=stored, progress=progress)
    output.say(f"{out}: {len(config.layers)} of {config.total_layers} layers, {to}")
