"""Bugs made on purpose: the sanitizer that `make sanitize-*` runs the tests under must report them.

Each runs in a process of its own, which is this file as a program.
"""

import ctypes
import os
import subprocess
import sys
import threading

import pytest
import torch
from support.packed import random_packed

from engine.kernels import native
from engine.kernels.w4.cpu import CpuWeight
from engine.kernels.w4.format import Spec

RUNTIME = ctypes.CDLL(None)
THREAD, ADDRESS = (hasattr(RUNTIME, name) for name in ("__tsan_init", "__asan_init"))
M, N, K = 33, 85, 64
CPU = native.load("cpu")
every_isa = pytest.mark.parametrize("isa", CPU.isas())


def multiply(isa: str, *outputs: torch.Tensor, calls: int = 1) -> None:
    """(M, K) @ (N, K).T into each of `outputs`, all at the same time, unchecked."""
    packed = random_packed(torch.Generator(), N, K, Spec(4, 32, "minimum"))
    tiles, x = CpuWeight.from_packed(packed).tiles, torch.randn(M, K)
    CPU.resize_pool(len(outputs))  # or one call would wait for the other's threads
    meet = threading.Barrier(len(outputs))

    def work(out: torch.Tensor) -> None:
        claimed = (out.data_ptr(), M * N, "float32", "cpu")  # whatever it has
        meet.wait()
        for _ in range(calls):
            CPU.w4_matmul(native.span(x), M, K, tiles, claimed, N, None, "int8", isa, 1)

    threads = [threading.Thread(target=work, args=(out,)) for out in outputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def overrun(isa: str) -> None:
    multiply(isa, torch.empty(M * N - 1))


def race(isa: str) -> None:
    multiply(isa, *[torch.empty(M, N)] * 2, calls=1000)


def no_race(isa: str) -> None:
    multiply(isa, torch.empty(M, N), torch.empty(M, N), calls=20)


def reports(bug: str, isa: str) -> str:
    """What the sanitizer says of it; empty where the process ends well."""
    options = os.environ.get("TSAN_OPTIONS", "") + ":halt_on_error=1"
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "TSAN_OPTIONS": options}
    ran = subprocess.run(
        [sys.executable, "-P", __file__, bug, isa],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0 or "Sanitizer" in ran.stderr, ran.stderr
    return ran.stderr if ran.returncode else ""


@pytest.mark.skipif(not ADDRESS, reason="make sanitize-address runs it")
@every_isa
def test_a_write_past_the_output_is_seen(isa):
    assert "heap-buffer-overflow" in reports("overrun", isa)


@pytest.mark.skipif(not THREAD, reason="make sanitize-thread runs it")
@pytest.mark.parametrize("isa", [isa for isa in CPU.isas() if isa in ("amx", "avx512")])
def test_two_writers_of_one_output_are_seen(isa):
    # The others write by memcpy, of which the lane's ignore_noninstrumented_modules says nothing.
    assert "data race" in reports("race", isa)
    assert reports("no_race", isa) == ""


if __name__ == "__main__":
    globals()[sys.argv[1]](sys.argv[2])
