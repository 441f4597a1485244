"""What the commands share: their common options, and how a refusal reaches the user."""

import os
import sys
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from engine.errors import InputError

if TYPE_CHECKING:
    from engine.api import Model
    from engine.artifacts import Plan

DEFAULT_MODEL = "smollm2-135m"

ModelArgument = Annotated[str, typer.Argument(help="Directory, .gguf file or hub id.")]
Drop = Annotated[
    str | None, typer.Option(metavar="LAYERS", help="Layers never loaded: 20-24 or 3,7,21-25.")
]
Keep = Annotated[str | None, typer.Option(metavar="LAYERS", help="The only layers loaded.")]
PlanFile = Annotated[
    Path | None, typer.Option("--plan", metavar="FILE", help="Layers chosen by `engine plan`.")
]
Backend = Annotated[
    str | None, typer.Option(help="Which kernels; the machine's best if not given.")
]
Dtype = Annotated[str | None, typer.Option(help="float32, float16 or bfloat16.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; one a core if not given.")]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the record to a file too.")
]

TextSource = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE",
        help="Text file or directory, .jsonl, .parquet or hub:NAME; built-in prose if not given.",
    ),
]
Column = Annotated[str, typer.Option(help="Of a .jsonl, .parquet or hub source.")]


def execute(app: Callable[..., Any]) -> None:
    """Runs a typer app; what the user can mend becomes one line on stderr and exit code 2."""
    # Before torch is imported. Its threads spin some 15 ms for the next operation, and where other
    # programs have their core GPTQ takes 20 times its CPU seconds (benchmarks/results/quality.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    warnings.showwarning = lambda message, *_: print(f"engine: {message}", file=sys.stderr)
    try:
        sys.exit(app(standalone_mode=False))
    except InputError as error:
        refuse(error)
    except RuntimeError as error:
        from engine.kernels.dispatch import BackendUnavailable

        if not isinstance(error, BackendUnavailable):
            raise
        refuse(error)
    except Exception as error:
        if type(error).__name__ == "Abort":
            sys.exit(130)  # Ctrl-C
        if not hasattr(error, "format_message"):  # typer's word on an option it could not read
            raise
        if message := error.format_message():
            refuse(message)
        sys.exit(2)  # the help was all there is to say


def refuse(error: Exception | str) -> NoReturn:
    print(f"engine: {error}", file=sys.stderr)
    sys.exit(2)


def check_writable(path: Path | None, *suffixes: str) -> None:
    """Raises before any work is done for a file that could not be written after it."""
    if path is not None and suffixes and path.suffix.lower() not in suffixes:
        raise InputError(f"{path}: expected a name that ends in {' or '.join(suffixes)}")
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise InputError(f"{path}: expected a file in a directory that is there")


def planned(path: Path, drop: str | None, keep: str | None) -> "Plan":
    """The Plan in a file, where neither --drop nor --keep is given."""
    from engine.artifacts import Plan

    if drop is not None or keep is not None:
        raise InputError("--plan excludes --drop and --keep")
    return Plan.load(path)


def open_model(ref: str, threads: int | None, **options: Any) -> tuple["Model", float]:
    """(model with its tokenizer, milliseconds that loading took, a download left out)."""
    import time

    import torch

    from engine.api import choose_backend, choose_device, load
    from engine.checkpoint.locate import locate

    if threads is not None:
        torch.set_num_threads(threads)
    device = choose_device(options.get("device"))
    choose_backend(options.get("backend"), device, options.get("dtype"))  # before any download
    path = locate(ref)
    start = time.perf_counter()
    model = load(path, **options)
    _ = model.text
    return model, (time.perf_counter() - start) * 1e3


@contextmanager
def progress(label: str):
    """Yields report(done, total), which draws a bar on stderr where that is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
