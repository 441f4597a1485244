"""Where a healing run and its cache lie, and what may be there already."""

import os
from pathlib import Path

from engine import scratch
from engine.artifacts import HEAL
from engine.errors import InputError

CACHED = (".", "teacher-", "streams-", "written-")  # what the names in a cache begin with


def place_of(out: Path) -> Path:
    """Of the run that writes the directory `out`."""
    return out.parent / f"{out.name}.healing"  # of "." and "/" too, which have no name


def check_new(out: Path) -> None:
    """InputError where `out` is there already; what a kill left behind it is removed."""
    scratch.clear_behind(out, place_of(out), HEAL)
    scratch.check_new(out)
    scratch.check_beside(scratch.partial_of(out))


def check_cache(cache: Path, out: Path) -> None:
    """InputError for anything but a directory of what the teacher says, or a name for one, and for
    a place where the run that writes `out` would clear it, or find it in its way."""
    scratch.check_name(cache)
    found = Path(os.path.realpath(cache))
    for taken in (out, place_of(out), scratch.partial_of(out)):
        if found.is_relative_to(os.path.realpath(taken)):
            raise InputError(f"cache: expected a directory of its own, found {taken}, of this run")
    place = next(each for each in (cache, *cache.absolute().parents) if os.path.lexists(each))
    if not place.is_dir():
        raise InputError(f"cache: expected a directory, {place} is a file")
    if cache == Path():  # what an empty name becomes
        raise InputError("cache: expected a directory of its own, found the current one")
    if not os.access(place, os.W_OK):
        raise InputError(f"cache: expected to write {place}, found it read-only")
    for name in sorted(os.listdir(cache)) if place == cache else ():
        if not name.startswith(CACHED):
            raise InputError(f"cache: expected a directory of its own, found {name} in {cache}")
