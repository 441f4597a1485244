"""Angular distances: every backend against float64, and the accumulator's arithmetic."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.angular_cases import CASES, DTYPES, boundaries

from engine.kernels import dispatch
from engine.kernels.angular import accumulate, cpu, reference
from engine.kernels.angular.accumulate import AngularAccumulator, triangle

ISAS = ["generic", "avx2", "avx512", "amx"]


@pytest.fixture(params=["reference", *ISAS])
def angular_sums(request):
    """One backend's function; instruction sets that this processor lacks are skipped."""
    if request.param == "reference":
        return reference.angular_sums
    if reason := dispatch.why_not("cpu"):
        pytest.skip(reason)
    x = torch.ones(2, 1, 1)
    try:
        cpu.angular_sums(x, isa=request.param)
    except ValueError as error:
        pytest.skip(str(error))
    return lambda *args, **options: cpu.angular_sums(*args, **options, isa=request.param)


def worst(angular_sums, x: torch.Tensor) -> float:
    """The largest error of a distance, against float64 on the same values."""
    expected = reference.angular_sums(x.double(), values=True).values
    return float((angular_sums(x, values=True).values - expected).abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*CASES, (33, 3, 4096), (66, 2, 771)])
def test_equals_float64(angular_sums, rng, shape, dtype):
    x = boundaries(rng, *shape, dtype)
    weights = torch.rand(shape[1], generator=rng, dtype=torch.float64) + 0.1
    expected = reference.angular_sums(x.double(), weights, values=True)
    got = angular_sums(x, weights, values=True)
    assert (got.values - expected.values).abs().max() < 1e-6
    assert ((got.sums - expected.sums) / weights.sum()).abs().max() < 1e-6
    ratio = got.squares / expected.squares
    assert (ratio - 1).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_massive_features(angular_sums, rng, dtype):
    """Two features that carry most of the norm, as language models have them."""
    x = torch.randn(1, 8, 576, generator=rng).repeat(17, 1, 1)
    spread = torch.logspace(-3, 0, 17)[:, None]
    x += spread[..., None] * torch.randn(17, 8, 576, generator=rng)
    x[..., 0] = 500 * (1 + 0.3 * spread * torch.randn(17, 8, generator=rng))
    x[..., 16] = -700 * (1 + 0.3 * spread * torch.randn(17, 8, generator=rng))
    assert worst(angular_sums, x.to(dtype)) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-30, 1e-4, 300.0, 1e18, 1e30])
def test_sizes(angular_sums, rng, dtype, size):
    if dtype == torch.float16 and not 1e-4 <= size <= 300:
        pytest.skip("beyond the range of float16")
    x = boundaries(rng, 6, 2, 130, torch.float64) * size
    x = x.to(dtype)
    assert worst(angular_sums, x) < 1e-6


def test_known_angles(angular_sums):
    angles = [1e-7, 1e-6, 1e-5, 1e-3, 0.1, 1, 1.5, 2, 3, 3.14, math.pi]
    angles = torch.tensor(angles, dtype=torch.float64)
    x = torch.zeros(2, len(angles), 5, dtype=torch.float64)
    x[0, :, 1] = 2
    x[1, :, 1], x[1, :, 3] = angles.cos(), angles.sin()
    got = angular_sums(x, values=True).values[:, 0]
    assert (got - angles / torch.pi).abs().max() < 1e-8


@pytest.mark.parametrize("dtype", DTYPES)
def test_identical_and_opposite(angular_sums, rng, dtype):
    x = torch.randn(1, 4, 4096, generator=rng).to(dtype)
    x = torch.cat([x, x, 2 * x, -x, -4 * x])
    got = angular_sums(x, values=True).values
    same = [[i // 3 == j // 3 for j in range(5)] for i in range(5)]
    pairs = torch.tensor([same[i][j] for i in range(5) for j in range(i + 1, 5)])
    assert got[:, pairs].abs().max() < 1e-7
    assert (got[:, ~pairs] - 1).abs().max() < 1e-7


def test_strided_rows(angular_sums, rng):
    x = boundaries(rng, 5, 24, 37, torch.bfloat16)
    last_tokens = x.reshape(5, 4, 6, 37)[:, :, -1]
    rows = [row.clone() for row in last_tokens]
    expected = angular_sums(rows).sums
    assert torch.equal(angular_sums(last_tokens).sums, expected)
    transposed = last_tokens.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(angular_sums(transposed).sums, expected)


def test_same_bits_every_time(angular_sums, rng):
    x = boundaries(rng, 9, 7, 300, torch.float16)
    first = angular_sums(x)
    assert all(torch.equal(angular_sums(x).sums, first.sums) for _ in range(3))


def test_unknown_instruction_set():
    if reason := dispatch.why_not("cpu"):
        pytest.skip(reason)
    with pytest.raises(ValueError, match="found 'sse9'"):
        cpu.angular_sums(torch.ones(2, 1, 1), isa="sse9")


@pytest.fixture(params=["reference", "cpu"])
def accumulator(request) -> AngularAccumulator:
    if reason := dispatch.why_not(request.param):
        pytest.skip(reason)
    return AngularAccumulator(request.param)


def test_result_by_its_definitions(accumulator, rng):
    x = boundaries(rng, 6, 40, 50, torch.float64)
    pairs = accumulator.update(x, values=True)
    result = accumulator.result()
    assert (result.samples, result.weight) == (40, 40)
    for count in range(1, 6):
        a, b = x[:-count], x[count:]
        cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1)
        distance = cosine.clamp(-1, 1).arccos() / torch.pi
        assert torch.allclose(result.distances[count - 1], distance.mean(1), atol=1e-7)
        error = distance.std(1) / math.sqrt(40)
        assert torch.allclose(result.standard_errors[count - 1], error, atol=1e-7)
        assert torch.allclose(triangle(pairs, 6)[count - 1].T, distance, atol=1e-7)
        if count == 1:
            assert torch.allclose(result.influence, 1 - cosine.mean(1), atol=1e-12)
            change = (b - a).norm(dim=-1) / b.norm(dim=-1)
            assert torch.allclose(result.magnitude, change.mean(1), atol=1e-7)


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 30), max_size=6), seed=st.integers(0, 2**32 - 1))
def test_any_split_merges_to_one_pass(cuts, seed):
    rng = torch.Generator().manual_seed(seed)
    x = boundaries(rng, 7, 30, 19, torch.float32)
    weights = torch.rand(30, generator=rng)
    whole = AngularAccumulator()
    whole.update(x, weights)
    merged = AngularAccumulator()
    edges = [0, *sorted(cuts), 30]
    for begin, end in zip(edges, edges[1:], strict=False):
        part = AngularAccumulator("reference" if end % 3 == 0 else None)
        part.update(x[:, begin:end], weights[begin:end])
        state = json.loads(json.dumps(part.to_state()))
        merged.merge(AngularAccumulator.from_state(state))
    one, many = whole.result(), merged.result()
    assert many.samples == one.samples
    for a, b in zip(one.distances, many.distances, strict=True):
        assert (a - b).abs().max() < 1e-8  # the backends differ by this near zero
    accumulated = AngularAccumulator.from_state(whole.to_state(), whole.backend)
    assert accumulated.to_state() == whole.to_state()


def test_split_of_one_backend_is_exact(accumulator, rng):
    x = boundaries(rng, 9, 41, 64, torch.bfloat16)
    accumulator.update(x)
    split = AngularAccumulator(accumulator.backend)
    for part in x.split([1, 13, 0, 20, 7], dim=1):
        split.update(part)
    for name in ("distances", "standard_errors"):
        one, many = getattr(accumulator.result(), name), getattr(split.result(), name)
        for a, b in zip(one, many, strict=True):
            assert (a - b).abs().max() < (1e-12 if name == "distances" else 1e-9)


def test_weights(accumulator, rng):
    x = boundaries(rng, 4, 6, 20, torch.float32)
    times = torch.tensor([1, 2, 0, 3, 1, 0])
    accumulator.update(x, times)
    repeated = AngularAccumulator(accumulator.backend)
    repeated.update(x.repeat_interleave(times, dim=1))
    assert accumulator.result().samples == 4
    for a, b in zip(accumulator.result().distances, repeated.result().distances, strict=True):
        assert (a - b).abs().max() < 1e-12


def test_masked_samples_are_not_read(accumulator, rng):
    x = boundaries(rng, 4, 6, 20, torch.float32)
    mask = torch.tensor([True, True, False, True, False, True])
    kept = AngularAccumulator(accumulator.backend)
    kept.update(x[:, mask])
    x[:, ~mask] = torch.nan
    accumulator.update(x, mask)
    assert accumulator.to_state() == kept.to_state()


def test_one_sample_has_no_standard_error(accumulator, rng):
    accumulator.update(boundaries(rng, 3, 1, 8, torch.float32))
    assert all(row.isnan().all() for row in accumulator.result().standard_errors)


def test_empty_batch(accumulator, rng):
    values = accumulator.update(torch.zeros(3, 0, 8), values=True)
    assert values.shape == (0, 3)
    with pytest.raises(ValueError, match="no samples"):
        accumulator.result()
    accumulator.update(boundaries(rng, 3, 2, 8, torch.float32))
    assert accumulator.result().samples == 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, -math.inf])
def test_vectors_without_direction(accumulator, rng, dtype, value):
    x = boundaries(rng, 5, 6, 40, dtype)
    x[3, 4] = x[3, 4] * 0 if value == 0 else value
    x[4, 5, 0] = math.nan
    what = "zero" if value == 0 else "not finite"
    with pytest.raises(ValueError, match=f"boundary 3, sample 4: .* {what}"):
        accumulator.update(x)
    assert accumulator.to_state() == {}


def test_wrong_inputs():
    accumulator = AngularAccumulator()
    with pytest.raises(ValueError, match="2 or more boundaries"):
        accumulator.update(torch.ones(1, 2, 3))
    with pytest.raises(ValueError, match=r"boundary 1 is \(2, 4\)"):
        accumulator.update([torch.ones(2, 3), torch.ones(2, 4)])
    with pytest.raises(TypeError, match="int32"):
        accumulator.update(torch.ones(2, 2, 3, dtype=torch.int32))
    with pytest.raises(ValueError, match="expected 2 weights"):
        accumulator.update(torch.ones(2, 2, 3), torch.ones(3))
    with pytest.raises(ValueError, match="weights of at least 0"):
        accumulator.update(torch.ones(2, 2, 3), torch.tensor([1.0, -1.0]))
    with pytest.raises(ValueError, match='"numpy" is none of'):
        AngularAccumulator("numpy")


def test_merge_of_another_model(rng):
    one, other = AngularAccumulator(), AngularAccumulator()
    one.update(boundaries(rng, 3, 2, 8, torch.float32))
    other.update(boundaries(rng, 4, 2, 8, torch.float32))
    with pytest.raises(ValueError, match="3 and of 4 boundaries"):
        one.merge(other)


@pytest.mark.parametrize("state", [{"boundaries": 3}, {"sums": 1}, {"boundaries": "x"}])
def test_states_that_are_none(state):
    with pytest.raises(ValueError, match="state"):
        AngularAccumulator.from_state(state)


def test_state_with_missing_sums(rng):
    accumulator = AngularAccumulator()
    accumulator.update(boundaries(rng, 3, 2, 8, torch.float32))
    state = accumulator.to_state()
    with pytest.raises(ValueError, match="do not fit"):
        AngularAccumulator.from_state(state | {"boundaries": 4})


def test_automatic_backend_is_named(rng):
    accumulator = AngularAccumulator()
    assert accumulator.backend is None
    accumulator.update(boundaries(rng, 3, 2, 8, torch.float32))
    assert accumulator.backend == ("reference" if dispatch.why_not("cpu") else "cpu")


def test_automatic_backend_takes_as_many_boundaries_as_there_are(rng, monkeypatch):
    """On a GPU too, whose kernel takes 128."""
    from engine.kernels.angular import fused

    assert max(fused.LAUNCHES) == dispatch.TRITON_BOUNDARIES
    monkeypatch.setattr(accumulate, "choose", lambda op, device: "triton")
    accumulator = AngularAccumulator()
    accumulator.update(boundaries(rng, dispatch.TRITON_BOUNDARIES + 1, 2, 8, torch.float32))
    assert accumulator.backend == "reference"


def test_asked_for_backend_works_or_raises(rng):
    if not dispatch.why_not("triton"):
        pytest.skip("this machine has a GPU")
    with pytest.raises(dispatch.BackendUnavailable, match="triton: "):
        AngularAccumulator("triton").update(boundaries(rng, 3, 2, 8, torch.float32))


STARVED = """
import resource, sys, torch
from engine.kernels.angular import cpu
torch.set_num_threads(2)
cpu.angular_sums(torch.ones(2, 4, 1))  # whose threads stay
boundaries = torch.ones(3000, 2, 1)  # 144 MB of sums, here and of a thread, whose room is 216
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 500 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    cpu.angular_sums(boundaries)
except MemoryError:
    sys.exit(3)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/statm")
@pytest.mark.skipif("san.so" in os.environ.get("LD_PRELOAD", ""), reason="sanitizers abort there")
def test_a_thread_that_finds_no_memory_says_so():
    done = subprocess.run([sys.executable, "-c", STARVED], capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
