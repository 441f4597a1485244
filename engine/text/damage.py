"""What comes of a damaged tokenizer, as one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.errors import InputError


@contextmanager
def tokenizer_errors(where: str | Path) -> Iterator[None]:
    """Turns whatever is raised on a damaged file into an InputError that names `where`."""
    try:
        yield
    except (InputError, KeyboardInterrupt, MemoryError, SystemExit):
        raise
    except OSError as error:
        raise InputError(f"{where}: {error.strerror or error}") from error
    except BaseException as error:  # a panic of the library is no Exception
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{where}: the tokenizer is damaged: {reason:.200}") from error
