"""Scores that a killed run has left in a file, so that the next one asks for the others alone."""

import json
import math
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any

from engine.errors import InputError
from engine.scratch import write_text

KIND = "shallow-scores"  # what the first line of a file of ours says
Kept = tuple[int, ...]


class Remembered:
    """A score of kept slots and what it has said, a line of JSON each behind one with a `key`.

    A file with another key is begun anew, one that is not ours refused (InputError). `anchor`
    stands for whatever else a score depends on or starts from: `prepare` is called with it before
    the next score that is not in the file.
    """

    def __init__(
        self, score: Callable[[Kept], float], prepare: Callable[[Kept], None], path: Path, key: str
    ) -> None:
        self.score, self.prepare, self.path = score, prepare, path
        self.anchor: Kept = ()
        self._prepared: Kept = ()
        self._known: dict[tuple[Kept, Kept], float] = {}
        lines = _read(path, key)
        for anchor, kept, value in lines:
            self._known[anchor, kept] = value
        first = {"kind": KIND, "key": key}  # and without the half line that a kill may leave
        write_text(path, "".join(json.dumps(line) + "\n" for line in [first, *lines]))

    def __call__(self, kept: Kept) -> float:
        found = self._known.get((self.anchor, kept))
        if found is None:
            if self._prepared != self.anchor:
                self.prepare(self.anchor)
                self._prepared = self.anchor
            found = self._known[self.anchor, kept] = self.score(kept)
            with self.path.open("a") as file:
                file.write(json.dumps([self.anchor, kept, found]) + "\n")
        return found


def _read(path: Path, key: str) -> list[tuple[Kept, Kept, float]]:
    """(anchor, kept, score) of the lines up to one that is damaged; none of another run's."""
    if not path.exists():
        return []
    first, *lines = path.read_bytes().splitlines() or [b""]
    head = _parsed(first)
    if not isinstance(head, dict) or head.get("kind") != KIND:
        raise InputError(f"{path}: is in the way and holds no scores of ours; move it away")
    scored = takewhile(bool, map(_scored, lines)) if head.get("key") == key else ()
    return [each for each in scored if each is not None]


def _scored(line: bytes) -> tuple[Kept, Kept, float] | None:
    """None of a line that is damaged."""
    match _parsed(line):
        case [[*anchor], [*kept], float(score)] if math.isfinite(score):
            if all(type(slot) is int for slot in (*anchor, *kept)):
                return tuple(anchor), tuple(kept), score
    return None


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
