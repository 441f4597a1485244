"""Scores that a killed run has left in a file, so that the next one asks for the others alone."""

import json
from collections.abc import Callable
from pathlib import Path

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
            self._known[tuple(anchor), tuple(kept)] = value
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


def _read(path: Path, key: str) -> list:
    """[anchor, kept, score] of every whole line; none of another run's."""
    if not path.exists():
        return []
    found = []
    for line in path.read_bytes().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    if not found or not isinstance(found[0], dict) or found[0].get("kind") != KIND:
        raise InputError(f"{path}: is in the way and holds no scores of ours; move it away")
    return found[1:] if found[0].get("key") == key else []
