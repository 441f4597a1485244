"""Scores that a killed run has left in a file, so that the next one asks for the others alone."""

import json
import math
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Protocol

from engine.scratch import write_errors, write_text

Kept = tuple[int, ...]
Line = tuple[Kept, Kept, float, bool]  # anchor, kept, score, whole


class Scorer(Protocol):
    """As `PrefixScorer`: what exceeds `most` may be given up, and then is not `whole`."""

    most: float
    whole: bool

    def __call__(self, kept: Kept) -> float: ...


class Remembered:
    """A scorer and what it has said, a line of JSON each in a file of this run's own.

    A score that was given up says no more than that it exceeds what it came to: it is asked for
    again where that is not above `most` any more, as in a run with other layers protected. `anchor`
    stands for whatever else a score depends on or starts from: `prepare` is called with it before
    the next score that is not in the file.
    """

    def __init__(self, score: Scorer, prepare: Callable[[Kept], None], path: Path) -> None:
        self.score, self.prepare, self.path = score, prepare, path
        self.anchor: Kept = ()
        self._prepared: Kept = ()
        self._known: dict[tuple[Kept, Kept], tuple[float, bool]] = {}
        if not path.exists():
            return
        lines = _read(path)
        for anchor, kept, value, whole in lines:
            self._known[anchor, kept] = value, whole
        # without the half line that a kill may leave
        write_text(path, "".join(json.dumps(line) + "\n" for line in lines))

    def __call__(self, kept: Kept) -> float:
        found, whole = self._known.get((self.anchor, kept), (-math.inf, False))
        if not whole and found <= self.score.most:
            if self._prepared != self.anchor:
                self.prepare(self.anchor)
                self._prepared = self.anchor
            found = self.score(kept)
            line = self.anchor, kept, found, self.score.whole
            self._known[self.anchor, kept] = found, self.score.whole
            with write_errors(self.path), self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        return found


def _read(path: Path) -> list[Line]:
    """The lines up to one that is damaged."""
    scored = takewhile(bool, map(_scored, path.read_bytes().splitlines()))
    return [each for each in scored if each is not None]


def _scored(line: bytes) -> Line | None:
    """None of a line that is damaged."""
    try:
        said = json.loads(line)
    except (ValueError, RecursionError):
        return None
    match said:
        case [[*anchor], [*kept], float(score), bool(whole)] if math.isfinite(score):
            if all(type(slot) is int for slot in (*anchor, *kept)):
                return tuple(anchor), tuple(kept), score, whole
    return None
