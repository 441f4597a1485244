"""How the commands speak: tables and sentences, progress, refusals; quietly or at length."""

import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol

from engine.errors import InputError

PROGRESS_S = 5.0  # between two lines of progress where there is no terminal


class Report(Protocol):
    """`note` is said beside the numbers: a loss, a speed."""

    def __call__(self, done: int, total: int, note: str = "") -> None: ...


_level = 0  # -1: quiet, 1: verbose


def set_quiet(asked: bool) -> bool:
    """The callback of --quiet."""
    if asked:
        _set_level(-1)
    return asked


def set_verbose(asked: bool) -> bool:
    """The callback of --verbose."""
    if asked:
        _set_level(1)
    return asked


def _set_level(level: int) -> None:
    global _level
    if _level not in (0, level):
        raise InputError("--quiet and --verbose exclude each other")
    _level = level


def say(text: str, end: str = "\n") -> None:
    """A sentence for people, on stdout."""
    if _level >= 0:
        print(text, end=end, flush=True)


def show(*what: Any, **options: Any) -> None:
    """Tables and the like for people, on stdout."""
    from rich.console import Console

    if _level >= 0:
        console = Console()
        for each in what:
            console.print(each, **options)


def note(text: str) -> None:
    """What only --verbose says, on stderr."""
    if _level > 0:
        print(f"engine: {text}", file=sys.stderr)


@contextmanager
def progress(label: str) -> Iterator[Report]:
    """Yields report(done, total): a bar on stderr where that is a terminal, else a line every
    few seconds."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if not console.is_terminal or _level < 0:
        yield _lines(label)
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(label, total=None)

        def report(done: int, total: int, note: str = "") -> None:
            text = f"{label}, {note}" if note else label
            bar.update(task, completed=done, total=total, description=text)

        yield report


def _lines(label: str) -> Report:
    last = time.monotonic()
    first: tuple[float, int] | None = None  # a run that is taken up again begins with much done

    def report(done: int, total: int, note: str = "") -> None:
        nonlocal last, first
        now = time.monotonic()
        first = first or (now, done)
        if _level < 0 or now - last < PROGRESS_S:
            return
        last = now
        seconds, since = now - first[0], done - first[1]
        left = f", {seconds / since * (total - done):.0f} s left" if since else ""
        said = f", {note}" if note else ""
        print(f"{label}: {done:,} of {total:,}{said}{left}", file=sys.stderr, flush=True)

    return report


def execute(app: Callable[..., Any]) -> None:
    """Runs a typer app; what the user can mend becomes one line on stderr and exit code 2."""
    global _level
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
    finally:
        _level = 0


def refuse(error: Exception | str) -> NoReturn:
    print(f"engine: {error}", file=sys.stderr)
    sys.exit(2)
