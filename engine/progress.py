"""How far long work is: a bar on stderr where that is a terminal, else a line every few seconds."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EVERY_S = 5.0  # between two lines
Report = Callable[[int, int], None]  # (done, in all)
silent = False  # what --quiet asks for


@contextmanager
def progress(label: str, nbytes: bool = False) -> Iterator[Report]:
    """Yields report(done, total); `nbytes` where these are bytes."""
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
        yield lambda done, total: bar.update(task, completed=min(done, total), total=total)


def _lines(label: str, unit: float) -> Report:
    start = last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if silent or now - last < EVERY_S:
            return
        last = now
        left = f", {(now - start) / done * (total - done):.0f} s left" if done else ""
        names = f"{done / unit:,.0f} of {total / unit:,.0f}{'' if unit == 1 else ' MB'}"
        print(f"{label}: {names}{left}", file=sys.stderr, flush=True)

    return report
