"""Rows of the tables that terminal and page share."""

import math
from collections.abc import Callable, Iterator

from engine.architecture.layers import format_layers
from engine.artifacts import Profile
from engine.errors import InputError
from engine.pruning.budget import PARTS, Budget

BEST_COLUMNS = ("layers", "best block", "distance", "standard error")
BUDGET_COLUMNS = ("", "file", "16 bits", "after", "share")


def best_blocks(profile: Profile) -> Iterator[tuple[str, str, str, str]]:
    """(size, layers, distance, standard error) of the best block of every size below L."""
    for count in range(1, len(profile.layers)):
        start = profile.best(count)
        yield (
            str(count),
            format_layers(profile.layers[start : start + count]),
            f"{profile.distance(start, count):.6f}",
            f"{profile.standard_errors[count - 1][start]:.6f}" if profile.vectors > 1 else "-",
        )


def budget_rows(found: Budget, bandwidth: float | None = None) -> Iterator[list[tuple[str, ...]]]:
    """Sections in rows of BUDGET_COLUMNS: parameters, weights, and what a token asks.

    The file's column holds what lies on disk; the share is of it where it is known, else of 16
    bits.
    """
    before, after, file = found.before, found.after, found.file

    def row(
        name: str, old: float, new: float, form: Callable[[float], str], disk: float | None = None
    ) -> tuple[str, ...]:
        base = old if disk is None else disk
        shown = "" if disk is None else form(disk)
        return name, shown, form(old), form(new), f"{new / base:.1%}" if base else "-"

    def parts(name: str, field: str, form: Callable[[float], str]) -> Iterator[tuple[str, ...]]:
        disk = file if field == "weight_bytes" else None
        for part in PARTS:
            if field != "parameters" or part != "scales":  # scales are no parameters
                size = None if disk is None else disk[part]
                yield row(f"  {part}", before[field][part], after[field][part], form, size)
        total = None if disk is None else sum(disk.values())
        yield row(name, before[f"total_{field}"], after[f"total_{field}"], form, total)

    count = "{:,}".format
    yield [
        row("layers", before["layers"], after["layers"], count),
        *parts("parameters", "parameters", count),
    ]
    yield [*parts("weight bytes", "weight_bytes", _bytes)]
    last = [
        row("KV bytes a token", before["kv_bytes_per_token"], after["kv_bytes_per_token"], _bytes),
        row(f"KV bytes at {found.context:,}", before["kv_bytes"], after["kv_bytes"], _bytes),
        row("read a token", before["bytes_per_token"], after["bytes_per_token"], _bytes),
        row("FLOPs a token", before["flops_per_token"], after["flops_per_token"], "{:.3e}".format),
    ]
    if bandwidth is not None:
        if not 0 < bandwidth * 1e9 < math.inf:
            raise InputError(f"bandwidth: expected a number of GB/s above 0, found {bandwidth}")
        old, new = (bandwidth * 1e9 / side["bytes_per_token"] for side in (before, after))
        last.append(row(f"tok/s at {bandwidth:g} GB/s", old, new, "{:,.1f}".format))
    yield last


def _bytes(size: float) -> str:
    return f"{size / 1e9:,.3f} GB" if size >= 1e9 else f"{size / 1e6:,.3f} MB"
