"""x @ W.T of 4-bit weights on a CPU: Shallow, torch's bfloat16, and torch's own 4-bit kernel.

    pytest benchmarks/bench_w4.py --benchmark-group-by=param:case
    pytest benchmarks/bench_w4.py -k "Llama-3-8B or bounds"
    pytest benchmarks/bench_w4.py -m slow       # smaller groups, and a matrix of 2 GB in float32

All three multiply the same weights and the same bfloat16 x, and are checked before they are timed.
In a round the peers multiply, the int8 peak of the instruction set in use is measured, memory that
the last-level cache cannot hold (512 MiB at most) is read, and Shallow multiplies: so all weights
come from memory, and what else the machine does meets all alike. A small matrix is multiplied in as
many copies as make 16 MiB. Each starts with warm threads of its own, and those of the others
asleep. Figures are medians over rounds: `us` a call, `share_of_reading` the bytes of weights, x and
y against that read, `share_of_compute` the operations against that peak, `x_bfloat16` and `x_int4`
how many times Shallow's time the peers take.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from statistics import median
from time import sleep

import pytest
import torch
from cases import MATRICES
from ceiling import Memory, int8_gop_s, shares, times_ns
from gpu import random_weights
from torch import Tensor

from engine.kernels import dispatch
from engine.kernels.w4.cpu import CpuWeight, isas, matmul
from engine.kernels.w4.format import Packed, Spec, unpack, unpack_codes

ROWS = (1, 2, 4, 8, 16, 64, 256)
ROUND_BYTES = 16 << 20  # of packed weights
BOUND = 1e-2  # RMS ratio of int8 activations
SECONDS = 1.2  # of rounds a case, where 3 rounds do not take longer
PAUSE_SECONDS = 0.02  # OpenMP's threads spin for about as long, on cores that others need
LARGEST = "Llama-2-70B gate and up"


def matrix_params() -> list:
    """(name, group): the largest that divides K; the rest, and the largest matrix, are slow."""
    found = []
    for name, (_, k) in MATRICES.items():
        largest = next(group for group in (128, 64, 32) if k % group == 0)
        for group in (32, 64, 128):
            if group <= largest:
                default = group == largest and name != LARGEST
                marks = () if default else pytest.mark.slow
                found.append(pytest.param((name, group), marks=marks, id=f"{name} g{group}"))
    return found


@dataclass(frozen=True)
class Case:
    """One matrix in every form, copied; x (256, K) bfloat16 and what x @ W.T must be."""

    packed: Packed
    ours: list[CpuWeight]
    dense: list[Tensor]  # (N, K) bfloat16
    int4: list[Tensor]  # torch's layout
    scales_and_zeros: Tensor  # (K / g, N, 2) bfloat16, torch's
    x: Tensor
    expected: Tensor

    @property
    def calls(self) -> int:
        """Of a round."""
        return len(self.ours)

    def peers(self, x: Tensor) -> dict[str, Callable[[], Tensor]]:
        int4_matmul = torch.ops.aten._weight_int4pack_mm_for_cpu
        dense, int4 = cycle(self.dense), cycle(self.int4)
        group, scales = self.packed.group, self.scales_and_zeros
        return {
            "bfloat16": lambda: x @ next(dense).T,
            "int4": lambda: int4_matmul(x, next(int4), group, scales),
        }


def make(name: str, group: int) -> Case:
    n, k = MATRICES[name]
    packed = random_weights(Spec(4, group, "symmetric"), n, k, "cpu")
    # torch takes bfloat16 scales: these are the same in both.
    packed = replace(packed, scales=packed.scales.bfloat16().half())
    wide = unpack(packed)
    scales = packed.scales.bfloat16().T
    copies = max(1, ROUND_BYTES // packed.nbytes)
    dense = wide.bfloat16()
    int4 = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unpack_codes(packed).int(), 1)
    x = torch.randn(max(ROWS), k).bfloat16()
    return Case(
        packed,
        [CpuWeight.from_packed(packed) for _ in range(copies)],
        [dense.clone() for _ in range(copies)],
        [int4.clone() for _ in range(copies)],
        torch.stack((scales, torch.zeros_like(scales)), dim=-1).contiguous(),
        x,
        x.float() @ wide.T,
    )


def check(name: str, got: Tensor, expected: Tensor) -> None:
    """A wrong result has no speed."""
    error = (got.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < BOUND, f"{name}: RMS ratio {error:.3g}"


@pytest.fixture(scope="module")
def memory() -> Memory:
    if reason := dispatch.why_not("cpu"):
        pytest.skip(reason)
    return Memory()


@pytest.fixture(scope="module", params=matrix_params())
def case(request) -> Case:
    return make(*request.param)


@pytest.mark.parametrize("m", ROWS)
def test_speed(benchmark, memory, case, m):
    x, weights = case.x[:m], cycle(case.ours)
    calls = {"ours": lambda: matmul(x, next(weights))} | case.peers(x)
    for name, call in calls.items():
        check(name, call(), case.expected[:m])
    isa = case.ours[0].isa
    found: dict[str, list[float]] = {"read": [], "peak": [], "bfloat16": [], "int4": []}

    def others() -> None:
        sleep(PAUSE_SECONDS)
        case.x @ case.x.T  # wakes torch's threads
        for name in ("bfloat16", "int4"):
            found[name] += times_ns(partial(repeat, calls[name], case.calls), rounds=1)[0]
        sleep(PAUSE_SECONDS)
        found["peak"].append(int8_gop_s(isa))
        found["read"].append(memory.read_gb_s())

    def run() -> None:
        repeat(calls["ours"], case.calls)

    round_ns = sum(sum(times) for times in times_ns(others, run, rounds=1))
    for times in found.values():
        times.clear()
    rounds = min(max(int(SECONDS * 1e9 / round_ns), 3), 15)
    benchmark.pedantic(run, setup=others, rounds=rounds)
    if benchmark.stats is not None:  # --benchmark-disable
        record(benchmark, case, m, {name: median(times) for name, times in found.items()})


def repeat(call: Callable[[], object], times: int) -> None:
    for _ in range(times):
        call()


def record(benchmark, case: Case, m: int, found: dict[str, float]) -> None:
    """Adds the rates to the benchmark's record; `found`: medians of `others`."""
    n, k = case.packed.shape
    round_ns = benchmark.stats.stats.median * 1e9
    size = case.ours[0].nbytes + 2 * m * (n + k)
    gb_s, gop_s = (amount * case.calls / round_ns for amount in (size, 2 * m * n * k))
    benchmark.extra_info.update(
        {"m": m, "n": n, "k": k, "group": case.packed.group, "isa": case.ours[0].isa},
        threads=torch.get_num_threads(),
        calls=case.calls,
        us=round_ns / case.calls / 1e3,
        bytes=size,
        gb_s=round(gb_s, 2),
        gop_s=round(gop_s, 1),
        read_gb_s=round(found["read"], 2),
        int8_gop_s=round(found["peak"], 1),
        x_bfloat16=round(found["bfloat16"] / round_ns, 2),
        x_int4=round(found["int4"] / round_ns, 2),
        **shares(gop_s / found["peak"], gb_s / found["read"]),
    )


def test_bounds(memory):
    """Of Llama-3-8B's gate and up: 80 % of reading at M=1, 50 % of the VNNI peak at M=128; AVX2
    60 % of VNNI at M=1."""
    vnni = next((isa for isa in isas() if isa in ("avx512", "avxvnni")), None)
    if vnni is None:
        pytest.skip("this processor has no VNNI")
    n, k = MATRICES["Llama-3-8B gate and up"]
    packed, x = random_weights(Spec(4, 128, "symmetric"), n, k, "cpu"), torch.randn(128, k)
    best, avx2, dots = (CpuWeight.from_packed(packed, isa) for isa in (isas()[0], "avx2", vnni))
    small = CpuWeight.from_packed(random_weights(Spec(4, 128, "symmetric"), 1024, k, "cpu"))
    expected = x @ unpack(packed).T
    for weight in (best, avx2, dots):
        for m in (1, 128):
            check(f"{weight.isa}, M={m}", matmul(x[:m], weight), expected[:m])
    read_gb_s, peak_gop_s, times = [], [], []
    for _ in range(15):
        read_gb_s.append(memory.read_gb_s())
        peak_gop_s.append(int8_gop_s(vnni))
        matmul(x[:1], small)  # reading drove out the code too, which no decoder meets cold
        one = [lambda w=w: matmul(x[:1], w) for w in (best, avx2, dots)]
        times.append(sum(times_ns(*one, lambda: matmul(x, best), rounds=1), []))
    one_ns, avx2_ns, vnni_ns, many_ns = map(median, zip(*times, strict=True))
    of_reading = best.nbytes / one_ns / median(read_gb_s)
    of_peak = 2 * 128 * n * k / many_ns / median(peak_gop_s)
    of_vnni = vnni_ns / avx2_ns
    print(
        f"\nM=1 {of_reading:.0%} of reading, M=128 {of_peak:.0%} of the peak of {vnni}, "
        f"avx2 {of_vnni:.0%} of {vnni}"
    )
    assert of_reading >= 0.8
    assert of_peak >= 0.5
    assert of_vnni >= 0.6
