"""Compares the shares of the ceiling that two runs of the benchmarks reached.

    python benchmarks/compare.py                       # the two latest of .benchmarks
    python benchmarks/compare.py before.json after.json --fall 0.05

The files are pytest-benchmark's (--benchmark-autosave, --benchmark-json). Exits with 1 when the
share of a case that both have falls by more than --fall, a part of what it was, and names these
cases last; with 2 when a file cannot be compared. Says so where the two ran on other processors.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

FALL = 0.1
STORAGE = Path(".benchmarks")  # pytest-benchmark's
WORK = "threads", "bytes"  # of a case, where it says them: shares of other ones compare with care

Case = tuple[float, dict[str, Any]]  # the share of the nearer ceiling, and WORK


class BadInput(Exception):
    """Says in one sentence which file cannot be compared, and why."""


def cases_of(file: Path) -> dict[str, Case]:
    """By name those that record the share of a ceiling."""
    try:
        benchmarks = json.loads(file.read_text())["benchmarks"]
        infos = [(one["fullname"], one["extra_info"]) for one in benchmarks]
        "".join(name for name, _ in infos).encode()  # raises for what is no text
        found = {
            name: (
                float(info[f"share_of_{info['ceiling']}"]),
                {key: info[key] for key in WORK if key in info},
            )
            for name, info in infos
            if "ceiling" in info
        }
    except OSError as error:
        raise BadInput(f"{file} cannot be read: {error.strerror}.") from error
    except (
        ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError
    ) as error:  # fmt: skip
        raise BadInput(f"{file} is not a record of pytest-benchmark ({error!r}).") from error
    names = [name for name, _ in infos]
    for name in names:
        if names.count(name) > 1:
            raise BadInput(f"{file} holds the case {name} twice.")
    for name, (share, _) in found.items():
        if not 0 < share < math.inf:
            raise BadInput(f"{file}: the share of {name} must be positive, found {share}.")
    if not found:
        raise BadInput(f"{file} holds no case with a share of a ceiling.")
    return found


def processor_of(file: Path) -> str | None:
    """By the name that a record gives it; None where it says none."""
    found = json.loads(file.read_text())
    for key in ("machine_info", "cpu", "brand_raw"):
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, str) else None


def latest(storage: Path) -> list[Path]:
    """The two latest runs, the older one first."""
    found = sorted(storage.glob("*/[0-9]*_*.json"), key=lambda file: file.stat().st_mtime_ns)
    if len(found) < 2:
        raise BadInput(
            f"{storage} must hold two runs of --benchmark-autosave, found {len(found)}; or name "
            "two files."
        )
    return found[-2:]


def report(before: dict[str, Case], after: dict[str, Case], fall: float) -> list[str]:
    """Prints a line a case, those of one run too; returns the cases that fell too far."""
    fallen = []
    for name in sorted(before.keys() | after.keys()):
        old, was = before.get(name, (None, {}))
        new, now = after.get(name, (None, {}))
        if old is None or new is None:
            change = "only before" if new is None else "only after"
        else:
            change = f"{new / old - 1:+.0%}"
            if new < old * (1 - fall):
                fallen.append(name)
                change += "  FELL"
            for key in WORK:
                if key in was and key in now and was[key] != now[key]:
                    change += f"  ({key}: {was[key]} before, {now[key]} after)"
        shown = ("     -" if share is None else f"{share:6.1%}" for share in (old, new))
        print(name, *shown, change, sep="  ")
    return fallen


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path, help="before and after")
    parser.add_argument("--fall", type=float, default=FALL, help="default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        if len(options.files) not in (0, 2):
            raise BadInput(f"Name two files or none, found {len(options.files)}.")
        if not 0 <= options.fall < 1:
            raise BadInput(f"--fall must be at least 0 and less than 1, found {options.fall}.")
        files = options.files or latest(STORAGE)
        before, after = map(cases_of, files)
        if not before.keys() & after.keys():
            raise BadInput("The two runs have no case in common.")
    except BadInput as error:
        print(error, file=sys.stderr)
        return 2
    fallen = report(before, after, options.fall)
    was, now = map(processor_of, files)
    if was and now and was != now:
        print(
            "The runs are of two processors, so their shares may differ by that alone: "
            f"{was} before, {now} after."
        )
    print(
        f"{len(fallen)} of {len(before.keys() & after.keys())} cases fell by more than "
        f"{100 * options.fall:.3g}%",
        ", ".join(fallen),
        sep=": " if fallen else "",
    )
    return 1 if fallen else 0


if __name__ == "__main__":
    sys.exit(main())
