"""The directory of a study that goes on where it was: of one model and one set of options alone."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from engine.checkpoint.adapter import stamps
from engine.checkpoint.locate import locate
from engine.errors import InputError
from engine.scratch import write_errors, write_text

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

NOTE = "study.json"
Row = TypeVar("Row", bound="DataclassInstance")


def begin(work: Path, model: str, asked: Mapping[str, Any]) -> None:
    """Makes `work`, or finds what the same study has left there; InputError where another did.

    Comes after all that may be refused: a study that was never begun claims no directory.
    """
    said = {**asked, "model": stamps(locate(model))}
    text = json.dumps(said, indent=1, sort_keys=True, default=str)
    note = work / NOTE
    with write_errors(work):
        work.mkdir(parents=True, exist_ok=True)
        if not note.is_file() and any(work.iterdir()):
            raise InputError(
                f"{work}: expected an empty directory or one of a study, found neither"
            )
    if not note.is_file():
        write_text(note, text)
    elif note.read_text(errors="replace") != text:
        raise InputError(f"{work}: holds a study of another model or with other options")


def kept(file: Path, kind: type[Row], make: Callable[[], Row]) -> Row:
    """What an earlier run has left in `file`; made now where that is missing or damaged."""
    with suppress(OSError, ValueError, TypeError):
        return kind(**json.loads(file.read_text()))
    made = make()
    write_text(file, json.dumps(asdict(made)))
    return made


@contextmanager
def clocked(file: Path, clock: Callable[[], float]) -> Iterator[None]:
    """Adds the seconds of its block to those in `file`, also where it is interrupted."""
    before, start = seconds(file), clock()
    try:
        yield
    finally:
        write_text(file, str(before + clock() - start))


def seconds(file: Path) -> float:
    """That `clocked` has counted; 0 where they are missing or damaged."""
    with suppress(OSError, ValueError):
        return float(file.read_text())
    return 0.0
