"""What the CPU benchmarks share: times taken in turns, and the ceilings a speed is a share of."""

from collections.abc import Callable
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import torch

from engine.kernels import native

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
MOST_BYTES = 512 << 20  # read to empty the caches, however large the last of them


def times_ns(*functions: Callable[[], object], rounds: int) -> list[list[int]]:
    """Every round's time of each; they take turns, so that a busy moment falls on all."""
    times: list[list[int]] = [[] for _ in functions]
    for _ in range(rounds):
        for function, found in zip(functions, times, strict=True):
            start = perf_counter_ns()
            function()
            found.append(perf_counter_ns() - start)
    return times


def shares(compute: float, reading: float) -> dict[str, Any]:
    """For a benchmark's record: both shares, and the nearer ceiling. compare.py reads them."""
    return {
        "share_of_compute": round(compute, 4),
        "share_of_reading": round(reading, 4),
        "ceiling": "compute" if compute > reading else "reading",
    }


def cache_bytes() -> int:
    """Of the last-level cache that the first CPU shares; 32 MiB where the system does not say."""
    sizes = [file.read_text().strip() for file in CACHES.glob("index*/size")]
    return max((int(size[:-1]) * UNITS[size[-1]] for size in sizes), default=32 << 20)


class Memory:
    """Memory in huge pages, more than the caches hold where that is at most 512 MiB."""

    def __init__(self) -> None:
        size = min(2 * cache_bytes(), MOST_BYTES)
        self.reader = native.load("cpu").Reader(size, torch.get_num_threads())

    def read_gb_s(self) -> float:
        """GB/s (1e9) of one pass, after which the caches hold nothing else."""
        return self.reader.gb_s()


def int8_gop_s(isa: str) -> float:
    """1e9 int8 multiplications and additions a second that `isa` does here and now."""
    return native.load("cpu").int8_peak(isa, torch.get_num_threads(), passes=1)
