"""How far long work is: a bar on stderr where that is a terminal, else a line every few seconds."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Protocol

EVERY_S = 5.0  # between two lines
silent = False  # what --quiet asks for
_joint: "Joint | None" = None  # the bar that all others are parts of


class Report(Protocol):
    """`note` is said beside the numbers: a loss, a speed."""

    def __call__(self, done: int, total: int, note: str = "") -> None: ...


Reporting = Callable[[str], AbstractContextManager[Report]]  # of what is counted


@contextmanager
def unheard(label: str) -> Iterator[Report]:
    """No word on progress."""

    def report(done: int, total: int, note: str = "") -> None:
        pass

    yield report


@contextmanager
def progress(label: str, nbytes: bool = False) -> Iterator[Report]:
    """Yields report(done, total); `nbytes` where these are bytes."""
    if _joint is not None:
        yield partial(_joint.hear, label)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    console = Console(stderr=True)
    if silent or not console.is_terminal:
        yield _lines(label, 1e6 if nbytes else 1)
        return
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn()
    shown = columns if nbytes else Progress.get_default_columns()
    with Progress(*shown, console=console, transient=True) as bar:
        task = bar.add_task(label, total=None)

        def report(done: int, total: int, note: str = "") -> None:
            text = f"{label}, {note}" if note else label
            bar.update(task, completed=min(done, total), total=total, description=text)

        yield report


class Joint:
    """One bar of work in stages, each of them a share of it."""

    def __init__(self, report: Report) -> None:
        self._report, self._stage, self._label, self._done = report, "", "", 0
        self._begin = self._end = self._reached = self._limit = 0.0

    def stage(self, name: str, end: float) -> None:
        """What is heard from now on is of this stage, which ends at `end` of the whole, 0..1."""
        self._stage, self._label = name, ""
        self._reached, self._limit = self._limit, end

    def hear(self, label: str, done: int, total: int, note: str = "") -> None:
        """A stage may count several things, one by one, and does not know how many: each has half
        of what is left, so that no bar is full while there is work."""
        if label != self._label or done < self._done:
            self._label, self._begin = label, self._reached
            self._end = (self._reached + self._limit) / 2
        self._done = done
        share = self._begin + (self._end - self._begin) * min(done / max(total, 1), 1)
        self._reached = max(self._reached, share)
        said = f"{self._stage}: {done:,} of {total:,} {label}"
        self._report(int(100 * self._reached), 100, f"{said}, {note}" if note else said)


@contextmanager
def joint(label: str) -> Iterator[Joint]:
    """Every `progress` inside is a part of this one."""
    global _joint
    with progress(label) as report:
        _joint = Joint(report)
        try:
            yield _joint
        finally:
            _joint = None


def _lines(label: str, unit: float) -> Report:
    last = time.monotonic()
    first: tuple[float, int] | None = None  # a run that is taken up again begins with much done

    def report(done: int, total: int, note: str = "") -> None:
        nonlocal last, first
        now = time.monotonic()
        first = first or (now, done)
        if silent or now - last < EVERY_S:
            return
        last = now
        seconds, since = now - first[0], done - first[1]
        left = f", {max(seconds / since * (total - done), 0):.0f} s left" if since > 0 else ""
        numbers = f"{done / unit:,.0f} of {total / unit:,.0f}{'' if unit == 1 else ' MB'}"
        said = f", {note}" if note else ""
        print(f"{label}: {numbers}{said}{left}", file=sys.stderr, flush=True)

    return report
