"""What the commands share: their common options, and opening what they name."""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine.checkpoint.fetch import DEFAULT
from engine.commands import output
from engine.errors import InputError

if TYPE_CHECKING:
    import torch

    from engine.api import Model
    from engine.architecture.config import ModelConfig
    from engine.artifacts import Artifact, Plan
    from engine.checkpoint import Checkpoint
    from engine.options import Options
    from engine.reference.decoder import Decoder

DEFAULT_MODEL = DEFAULT.name

ModelArgument = Annotated[str, typer.Argument(help="Directory, .gguf file or hub id.")]
Drop = Annotated[
    str | None, typer.Option(metavar="LAYERS", help="Layers to leave out: 20-24 or 3,7,21-25.")
]
Keep = Annotated[str | None, typer.Option(metavar="LAYERS", help="Load these layers only.")]
PlanFile = Annotated[
    Path | None,
    typer.Option("--plan", metavar="FILE", help="Leave out the layers that `engine plan` chose."),
]
Backend = Annotated[
    str | None, typer.Option(help="cpu, triton, cuda or reference. Default: the best here.")
]
Dtype = Annotated[str | None, typer.Option(help="Compute dtype: float32, float16 or bfloat16.")]
MOST_THREADS = 1024  # OpenMP's library dies of tens of thousands
Threads = Annotated[
    int | None,
    typer.Option(min=1, max=MOST_THREADS, help="CPU threads. Default: one a core."),
]
Isa = Annotated[
    str | None,
    typer.Option(
        help="Instruction set of the cpu backend: avx512, avx2 ... Default: the best here."
    ),
]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Also write the record to a file.")
]

Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet",
        help="Print only the JSON record and errors.",
        callback=output.set_quiet,
        is_eager=True,
    ),
]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose",
        help="Also say what is chosen and how long it takes, on stderr.",
        callback=output.set_verbose,
        is_eager=True,
    ),
]

TextSource = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE",
        help="Text file or directory, .jsonl, .parquet or hub:NAME. Default: built-in prose.",
    ),
]
Column = Annotated[str, typer.Option(help="Column of a .jsonl, .parquet or hub source.")]


def check_writable(
    path: Path | None, *suffixes: str, reads: Iterable[str | Path | None] = ()
) -> None:
    """Raises before any work is done for a file that could not be written after it, or that the
    command `reads`."""
    if path is not None and suffixes and path.suffix.lower() not in suffixes:
        raise InputError(f"{path}: expected a name that ends in {' or '.join(suffixes)}")
    if path is not None:
        from engine.scratch import check_target

        check_target(path, reads)


def check_once(texts: Iterable[str | Path]) -> None:
    """InputError for a text that is given twice, under whatever names."""
    seen: set[str] = set()
    for text in texts:
        if (place := os.path.realpath(text)) in seen:
            raise InputError(f"{text}: the text is given twice")
        seen.add(place)


def check_outside(out: Path, text: str | None) -> None:
    """InputError for a directory in one that is read as text: what lies beside it would be read,
    too, so that a rerun would find another text and begin anew."""
    if text and not text.startswith("hub:") and Path(text).resolve() in out.resolve().parents:
        raise InputError(f"{out}: lies in the text {text}; name a place outside it")


def hand_out(record: "Artifact", file: Path | None, show: Callable[[], None]) -> None:
    """Shows tables, then the record as the last line, JSON, and in `file` where --json names one,
    which is there even where nothing can be printed."""
    try:
        show()
        print(json.dumps(record.to_json()), flush=True)
    finally:
        if file is not None:
            record.save(file)


def dropped(plan: Path | None, drop: str | None, keep: str | None = None) -> "Plan | str | None":
    """What goes: the Plan in a file or, where none is named, `drop`; InputError for both."""
    if plan is None:
        return drop
    from engine.artifacts import Plan

    if drop is not None or keep is not None:
        raise InputError("--plan excludes --drop and --keep")
    return Plan.load(plan)


def as_options(**given: Any) -> "Options":
    """`Options` with its own defaults for what is None; InputError for what has no effect."""
    from engine.options import Options

    options = Options(**{name: value for name, value in given.items() if value is not None})
    if options.temperature == 0:
        for name in ("top_k", "top_p", "min_p", "seed"):
            if given.get(name) is not None:
                raise InputError(
                    f"--{name.replace('_', '-')}: has no effect at --temperature 0, which takes "
                    "the likeliest token"
                )
    return options


def open_checkpoint(ref: str) -> tuple[Path, "Checkpoint"]:
    """(where a model lies, its checkpoint): what is wrong with them is said before torch, which
    takes seconds to import, is asked for."""
    from engine.checkpoint import open_checkpoint
    from engine.checkpoint.locate import locate

    path = locate(ref)
    output.note(f"model: {path}")
    return path, open_checkpoint(path)


def open_to_write(
    ref: str, plan: Path | None, drop: str | None, keep: str | None, dtype: str | None
) -> tuple["Checkpoint", "ModelConfig", "torch.dtype | None"]:
    """(checkpoint, the layers that stay, the dtype asked for) of a model written anew."""
    from engine.checkpoint import choose_layers
    from engine.runtime import check_backend

    check_backend(None, dtype)  # before any download
    chosen = dropped(plan, drop, keep)
    _, checkpoint = open_checkpoint(ref)
    config = choose_layers(checkpoint, chosen, keep)
    from engine.kernels.dtypes import dtype_of

    return checkpoint, config, None if dtype is None else dtype_of(dtype)


def open_model(ref: str, threads: int | None, **options: Any) -> tuple["Model", float]:
    """(model with its tokenizer, milliseconds that loading took, a download left out)."""
    import time
    from itertools import count

    from engine.artifacts import Plan
    from engine.checkpoint import choose_layers
    from engine.runtime import check_backend

    check_backend(options.get("backend"), options.get("dtype"))  # before any download
    path, checkpoint = open_checkpoint(ref)
    drop = options.get("drop")
    if isinstance(drop, Plan):  # load() checks it, and warns where it is for other weights
        total = len(drop.keep)
    else:
        total = len(choose_layers(checkpoint, drop, options.get("keep")).layers)
    from engine.api import load

    set_threads(threads)
    start = time.perf_counter()
    with output.progress("layers") as report:
        done = count(1)
        model = load(path, **options, progress=lambda layer: report(next(done), total))
    _ = model.text
    load_ms = (time.perf_counter() - start) * 1e3
    output.note(f"{model!r}, opened in {load_ms:.0f} ms")
    return model, load_ms


def open_decoder(checkpoint: "Checkpoint", config: "ModelConfig") -> "Decoder":
    """The oracle on the best device, for stages that look inside a model."""
    from engine.api import choose_device, choose_dtype
    from engine.reference.decoder import load_decoder

    device = choose_device(None)
    return load_decoder(checkpoint, config, device, choose_dtype(None, checkpoint, device))


def set_threads(threads: int | None) -> None:
    """torch's, which are the runtimes' too."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
