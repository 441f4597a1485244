"""How the commands speak: tables and sentences, progress, refusals; quietly or at length."""

import errno
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NoReturn

from engine import progress as how_far
from engine.commands import interrupt
from engine.errors import InputError

if TYPE_CHECKING:
    import typer

progress, joint = how_far.progress, how_far.joint
TOO_LITTLE = "there is not enough memory for this: a smaller batch or context needs less"
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


def hush() -> None:
    """Of several processes one speaks, and it is another."""
    global _level
    _level, how_far.silent = -1, True


def _set_level(level: int) -> None:
    global _level
    if _level not in (0, level):
        raise InputError("--quiet and --verbose exclude each other")
    _level, how_far.silent = level, level < 0


@contextmanager
def hushed() -> Iterator[None]:
    """Nothing is said or shown inside; progress goes on."""
    global _level
    before, _level = _level, -1
    try:
        yield
    finally:
        _level = before


def say(text: str, end: str = "\n") -> None:
    """A sentence for people, on stdout."""
    if _level >= 0:
        print(text, end=end, flush=True)


def show(*what: Any, **options: Any) -> None:
    """Tables and the like for people, on stdout."""
    from rich.console import Console

    if _level >= 0:
        console = Console(markup=False)  # names may hold brackets
        for each in what:
            for column in getattr(each, "columns", ()):
                column.overflow = "fold"  # a narrow terminal breaks a number; else it cuts it off
            console.print(each, **options)


def note(text: str) -> None:
    """What only --verbose says, on stderr."""
    if _level > 0:
        print(f"engine: {text}", file=sys.stderr)


def leave_out(context: "typer.Context | None", options: Iterable[str], why: str) -> None:
    """InputError where the user has written one of these, which nothing would read; a command that
    another calls has no context."""
    for name in options:
        source = None if context is None else context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise InputError(f"{name.replace('_', '-')}: {why}")


def _warn(message: Warning | str, category: type[Warning]) -> None:
    if not issubclass(category, DeprecationWarning):  # between a library and those who call it
        print(f"engine: {message}", file=sys.stderr)


def execute(app: Callable[..., Any]) -> None:
    """Runs a typer app; what the user can mend becomes one line on stderr and exit code 2."""
    global _level
    # Before torch is imported. Its threads spin some 15 ms for the next operation, and where other
    # programs have their core GPTQ takes 20 times its CPU seconds (benchmarks/results/quality.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    warnings.showwarning = lambda message, category, *_: _warn(message, category)
    interrupt.begin()
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):  # a path may hold bytes that are no UTF-8
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        os.getcwd()  # where it is gone, libraries fail in their own words
        code = app(standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
        sys.exit(code)
    except InputError as error:
        _tidy()
        refuse(error)
    except (BrokenPipeError, SystemExit) as error:
        if not isinstance(error.__context__ or error, BrokenPipeError):
            raise
        _silence()  # nobody reads on: the end that SIGPIPE makes of other programs
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno is None:  # of a library, in its own words: a hub that it cannot reach
            refuse(" ".join(str(error).split()) or type(error).__name__)
        _silence()
        refuse(f"{_place_of(error)}: {error.strerror or error}")
    except MemoryError:
        refuse(TOO_LITTLE)
    except RuntimeError as error:
        from engine.kernels.dispatch import BackendUnavailable

        if isinstance(error, BackendUnavailable):
            refuse(error)
        words = "can't allocate memory", "Cannot allocate memory"
        if any(each in str(error) for each in words):  # torch's, which have no class on a CPU
            refuse(TOO_LITTLE)
        from engine.runtime.gpu_cache import lacks_memory, out_of_memory

        if not lacks_memory(error):
            raise
        refuse(out_of_memory("this", "the GPU", error))
    except Exception as error:
        if type(error).__name__ == "Abort":
            sys.exit(interrupt.CODE)
        if isinstance(error, ImportError) and "failed to map segment" in str(error):
            refuse(TOO_LITTLE)
        if isinstance(error, SystemError) and "exception set" in str(error):  # of an import, too
            refuse(TOO_LITTLE)
        if not hasattr(error, "format_message"):  # typer's word on an option it could not read
            raise
        if message := error.format_message():
            refuse(message)
        sys.exit(2)  # the help was all there is to say
    finally:
        if interrupt.asked():
            interrupt.leave()
        _level, how_far.silent = 0, False


def _place_of(error: OSError) -> str:
    """What an error of the system is about where it names no file."""
    if error.filename is not None:
        return str(error.filename)
    return "the current directory" if error.errno == errno.ENOENT else "standard output"


def refuse(error: Exception | str) -> NoReturn:
    with suppress(OSError):
        print(f"engine: {error}", file=sys.stderr)
    sys.exit(2)


def _tidy() -> None:
    """Takes away what a refused run has only begun."""
    if "torch" in sys.modules:  # else it has not begun anything
        with suppress(OSError):  # also of an import, where no file can be opened any more
            from engine.artifacts import HEAL
            from engine.checkpoint.files import TOKENIZER_FILES
            from engine.export.packed import PLAN
            from engine.scratch import forget_bare

            forget_bare(("config.json", HEAL, PLAN, *TOKENIZER_FILES))


def _silence() -> None:
    """What standard output still holds goes nowhere, instead of into an error at the exit."""
    with suppress(OSError, AttributeError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
