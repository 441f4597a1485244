"""Where a healing run lies until it has ended, and what may be there already."""

from pathlib import Path

from engine import scratch
from engine.artifacts import HEAL


def place_of(out: Path) -> Path:
    """Of the run that writes the directory `out`."""
    return out.with_name(out.name + ".healing")


def check_new(out: Path) -> None:
    """InputError where `out` is there already; what a kill left behind it is removed."""
    scratch.clear_behind(out, place_of(out), HEAL)
    scratch.check_new(out)
