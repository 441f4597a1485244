"""Angular distances of all pairs of boundaries: Shallow, torch, and the loop the peers run.

    pytest benchmarks/bench_angular.py --benchmark-group-by=param:model,param:samples

`peers` is one batched cosine call for each block, as PruneMe and short-transformers make; `einsum`
is normalisation, one batched product, arccos and mean; `product` is that product alone, without
normalisation or angles. Samples arrive in batches of at most 256, as profiling sends them.
Each case records GFLOP/s and GB/s of what must be done (a product for each pair, one read), and the
share of the nearer ceiling: torch's float64 or, for 16-bit inputs, float32 matmul, or reading.
"""

from collections.abc import Callable
from functools import partial
from statistics import median

import pytest
import torch
from cases import MODELS
from ceiling import shares, times_ns
from torch import Tensor

from engine.checkpoint import open_checkpoint
from engine.checkpoint.locate import locate
from engine.commands.common import open_decoder
from engine.errors import InputError
from engine.kernels import dispatch, native
from engine.kernels.angular import reference
from engine.kernels.angular.accumulate import AngularAccumulator
from engine.pruning.profile import describe, measure
from engine.reference.stream import pad_batches

BATCH = 256
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def shallow(x: Tensor) -> list[Tensor]:
    accumulator = AngularAccumulator("cpu")
    accumulator.update(x)
    return list(accumulator.result().distances)


def peers(x: Tensor) -> list[Tensor]:
    rows: list[Tensor] = []
    for count in range(1, len(x)):
        row = []
        for start in range(len(x) - count):
            a, b = x[start].float(), x[start + count].float()
            cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1)
            row.append((cosine.clamp(-1, 1).arccos() / torch.pi).mean())
        rows.append(torch.stack(row))
    return rows


def einsum(x: Tensor) -> list[Tensor]:
    unit = x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    angle = product(unit).float().clamp(-1, 1).arccos() / torch.pi
    mean = angle.mean(0)
    return [mean.diagonal(count) for count in range(1, len(x))]


def product(x: Tensor) -> Tensor:
    return torch.einsum("ibd,jbd->bij", x, x)


METHODS = {"shallow": shallow, "peers": peers, "einsum": einsum}


@pytest.fixture(scope="module")
def ceilings() -> dict[str, float]:
    """GB/s of reading, and GFLOP/s of matmuls of 2048 x 2048 for inputs of 32 and of 16 bits."""
    if reason := dispatch.why_not("cpu"):
        pytest.skip(reason)
    found = {"read": native.load("cpu").read_bandwidth(512 * 2**20, torch.get_num_threads())}
    for bits, dtype in ((32, torch.float64), (16, torch.float32)):
        a = torch.rand(2048, 2048, dtype=dtype)
        found[f"{bits} bits"] = 2 * 2048**3 / best_ns(partial(torch.matmul, a, a))[0]
    return found


def best_ns(*functions: Callable[[], object], rounds: int = 5) -> list[int]:
    """The shortest time of each."""
    return [min(times) for times in times_ns(*functions, rounds=rounds)]


def residual_stream(model: str, samples: int, dtype: torch.dtype) -> Tensor:
    """(L + 1, samples, D), neighbours 0.1 apart at first and ever nearer."""
    L, D = MODELS[model].layers, MODELS[model].hidden_size
    x = torch.empty(L + 1, samples, D, dtype=dtype)
    state = torch.randn(samples, D)
    for boundary in x:
        boundary.copy_(state)
        state += 0.3 * torch.randn(samples, D)
    return x


@pytest.mark.parametrize("method", [*METHODS, "product"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("samples", [64, 256, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("model", MODELS)
def test_speed(benchmark, ceilings, model, samples, dtype, method):
    x = residual_stream(model, min(samples, BATCH), DTYPES[dtype])
    sizes = [len(part) for part in torch.arange(samples).split(BATCH)]
    if method != "product":
        check(METHODS[method], x, 1e-6 if method == "shallow" else 0.03)

    def run() -> None:
        for size in sizes:
            METHODS.get(method, product)(x[:, :size])

    benchmark.pedantic(
        run, rounds=3 if method == "peers" or samples > BATCH else 7, warmup_rounds=1
    )
    if benchmark.stats is not None:  # --benchmark-disable
        record(benchmark, ceilings, x, samples)


def check(method: Callable[[Tensor], list[Tensor]], x: Tensor, bound: float) -> None:
    """A wrong result has no speed; 16-bit einsum errs by 0.03, which is why it is not used."""
    part = x[:, :2].contiguous()
    expected = reference.angular_sums(part.unbind()).sums[0] / 2
    i, j = torch.triu_indices(len(x), len(x), 1)
    got = torch.cat([row.double() for row in method(part)])
    expected = torch.cat([expected[j - i == count] for count in range(1, len(x))])
    assert (got - expected).abs().max() < bound


def record(benchmark, ceilings: dict[str, float], x: Tensor, samples: int) -> None:
    """Adds the rates to the benchmark's record."""
    boundaries, D = len(x), x.shape[2]
    nanoseconds = benchmark.stats.stats.median * 1e9
    gflops = boundaries * (boundaries + 1) * D * samples / nanoseconds
    gb_s = boundaries * D * samples * x.itemsize / nanoseconds
    compute = gflops / ceilings[f"{8 * x.itemsize} bits"]
    benchmark.extra_info.update(
        gflop_s=round(gflops, 1),
        gb_s=round(gb_s, 2),
        **shares(compute, gb_s / ceilings["read"]),
    )


def test_bounds(ceilings):
    """Llama-3-8B, 256 samples: 3 x einsum, product's time in float32; 1.3 x that from bfloat16."""
    x = residual_stream("Llama-3-8B", 256, torch.float32)
    half = x.bfloat16()
    ours, ours_half, whole, bare = best_ns(
        lambda: shallow(x), lambda: shallow(half), lambda: einsum(x), lambda: product(x), rounds=15
    )
    print(f"\n{ours=} {ours_half=} {whole=} {bare=} nanoseconds")
    assert 3 * ours <= whole
    assert ours <= bare
    assert 1.3 * ours_half <= ours


@pytest.fixture(scope="module")
def default_model():
    """Its checkpoint and its decoder."""
    try:
        checkpoint = open_checkpoint(locate("smollm2-135m"))
    except InputError as error:
        pytest.skip(str(error))
    return checkpoint, open_decoder(checkpoint, checkpoint.config)


@pytest.mark.parametrize("tokens", ["last", "all"])
def test_profile_bounds(default_model, tokens):
    """Profiling takes at most 1.05 x the forward passes it rides on: 8 samples of 256 tokens."""
    checkpoint, decoder = default_model
    samples = torch.randint(decoder.config.vocab_size, (8, 256)).tolist()
    source = describe("smollm2-135m", checkpoint, decoder.config, samples, tokens)

    def forward() -> None:
        for batch in pad_batches(samples, 2048, decoder.config):
            cache = decoder.new_cache(len(batch), 256)
            decoder.forward(batch, cache)

    def profile() -> None:
        measure(decoder, samples, source)

    times = times_ns(profile, forward, rounds=9)
    ratio = median(profiled / bare for profiled, bare in zip(*times, strict=True))
    print(f"\n{tokens=} profiled, bare: {times} nanoseconds, {ratio=:.3f}")
    assert ratio <= 1.05
