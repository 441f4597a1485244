"""The CPU decoder against its bounds, on the default model in the bits of its own file, and on the
shape of one that no cache holds.

    pytest -s benchmarks/bench_decoder.py
    pytest -s benchmarks/bench_decoder.py -k "no_cache_holds and avx2"
    pytest benchmarks/bench_decoder.py --benchmark-only [--shapes DIR]    # a step's speed alone

Every figure is a ratio of medians whose parts took turns, so that a slow spell meets both. The
bandwidth is that of a buffer of the model's size, read by the same threads in between. Prints what
was found beside what was asked; fails where a bound is missed.
"""

import subprocess
import sys
from pathlib import Path
from statistics import median
from time import perf_counter_ns

import pytest
import scaling
import torch
from ceiling import times_ns
from shapes import FILES, write

from engine.api import Model, load
from engine.checkpoint import open_checkpoint
from engine.checkpoint.locate import locate
from engine.kernels import native
from engine.kernels.w4.cpu import isas
from engine.quantize.packing import pack
from engine.quantize.recipe import Recipe
from engine.runtime import Greedy
from engine.runtime.cpu import CpuRuntime

DEFAULT = "smollm2-135m"
ISAS = [isa for isa in isas() if isa != "generic"]
ROUNDS = 20
STEP_ROUNDS = 8  # of a case that is recorded: a large model takes seconds a round
TOKENS = 32  # of a turn: the first finds the other's memory in the caches
OPEN = """
import sys, time
import gguf, jinja2, safetensors, tokenizers, torch
import engine.generation, engine.runtime.cpu, engine.text
from engine.api import load
start = time.perf_counter()
model = load(sys.argv[1])
print((time.perf_counter() - start) * 1e3)
ids = model.text.encode("The old man looked at the sea and thought of all the fish")[:16]
model.runtime.forward(torch.tensor([ids]), model.runtime.new_cache(1, 64))
print((time.perf_counter() - start) * 1e3)
"""


@pytest.fixture(scope="module")
def model() -> Model:
    return load(backend="cpu")


class Decode:
    """Called, it decodes TOKENS tokens behind `context` others in each of `batch` sequences."""

    def __init__(self, model: Model, context: int = 16, batch: int = 1) -> None:
        self.runtime, self.context = model.runtime, context
        self.cache = self.runtime.new_cache(batch, context + TOKENS)
        ids = torch.randint(self.runtime.config.vocab_size, (batch, context))
        self.runtime.forward(ids, self.cache)
        self.token = ids[:, :1].contiguous()
        self.chosen = ids[:, 0].tolist()

    def __call__(self) -> None:
        self.cache.truncate(self.context)
        for _ in range(TOKENS):
            self.runtime.forward(self.token, self.cache)

    def choose(self) -> None:
        """The same as `generate` does it: each step is fed the likeliest tokens of the last."""
        assert isinstance(self.runtime, Greedy)
        self.cache.truncate(self.context)
        for _ in range(TOKENS):
            self.chosen = self.runtime.greedy(self.chosen, self.cache)


class Read:
    """Called, it reads a buffer of so many bytes eight times and keeps the best, the ceiling that
    bounds are of, and the median, which others disturb as they do a step."""

    def __init__(self, nbytes: int, threads: int) -> None:
        self.reader = native.load("cpu").Reader(nbytes, threads)
        self.speeds: list[float] = []
        self.usual: list[float] = []

    def __call__(self) -> None:
        passes = [self.reader.gb_s() for _ in range(8)]
        self.speeds.append(max(passes))
        self.usual.append(median(passes))

    @property
    def gb_s(self) -> float:
        return median(self.speeds)

    def __str__(self) -> str:
        return f"a read of {self.gb_s:.1f} GB/s, {median(self.usual):.1f} by the median pass"


def medians_ns(*functions, rounds: int = ROUNDS) -> list[float]:
    """Of a call of each, after one that does not count."""
    return [median(found[1:]) for found in times_ns(*functions, rounds=rounds + 1)]


def report(name: str, found: float, asked: float) -> None:
    print(f"\n{name}: {found:.1%}, asked {asked:.0%}")
    assert found >= asked


@pytest.fixture(scope="module", params=[DEFAULT, *FILES])
def timed_model(request) -> str:
    """What `load` takes: the default model, or a file of --shapes."""
    return DEFAULT if request.param == DEFAULT else str(written(request))


def written(request) -> Path:
    """The file of --shapes of the shape that is asked for."""
    directory = request.config.getoption("--shapes")
    if directory is None:
        pytest.skip("--shapes does not say where models of this shape lie")
    file = Path(directory, f"{request.param}.gguf")
    if not file.exists():
        pytest.skip(f"python benchmarks/shapes.py {request.param} {directory} writes this shape")
    return file


@pytest.mark.parametrize("isa", ISAS)
def test_steps(benchmark, timed_model, isa):
    """TOKENS steps a round, beside a read of what they read; `compare.py` compares the shares."""
    model = load(timed_model, backend="cpu", isa=isa)
    weights, threads = model.runtime.weight_bytes_per_token, model.runtime.threads
    read = Read(weights, threads)
    benchmark.pedantic(Decode(model), setup=read, rounds=STEP_ROUNDS, warmup_rounds=1)
    if benchmark.stats is not None:  # --benchmark-disable
        step_ns = benchmark.stats.stats.median * 1e9 / TOKENS
        benchmark.extra_info.update(
            threads=threads,
            tok_s=round(1e9 / step_ns, 1),
            bytes=weights,
            read_gb_s=round(read.gb_s, 2),
            share_of_reading=round(weights / step_ns / read.gb_s, 4),
            ceiling="reading",
        )


def test_share_of_the_bandwidth(model):
    weights = model.runtime.weight_bytes
    read = Read(weights, model.runtime.threads)
    ns = medians_ns(Decode(model), read)[0] / TOKENS
    print(f"\n{1e9 / ns:.0f} tok/s beside {read}", end="")
    report("decoding, of the bandwidth", weights / ns / read.gb_s, 0.65)


@pytest.fixture(scope="module", params=["Llama-3.2-1B", "Llama-3.2-1B-Q4_K_M", "Llama-3-8B"])
def shape(request, tmp_path_factory) -> Path:
    if request.param == "Llama-3-8B":  # 4.5 GB
        return written(request)
    return write(request.param, tmp_path_factory.mktemp("shape"))


@pytest.mark.parametrize(("threads", "asked"), [(2, 0.82), (1, 0.80)])
@pytest.mark.parametrize("isa", ISAS)
def test_a_model_that_no_cache_holds(shape, isa, threads, asked):
    model = load(shape, backend="cpu", isa=isa, threads=threads)
    weights = model.runtime.weight_bytes_per_token
    read = Read(weights, threads)
    ns = medians_ns(Decode(model), read, rounds=6)[0] / TOKENS
    print(f"\n{isa}: {1e9 / ns:.1f} tok/s beside {read}", end="")
    report(f"{threads} threads, decoding, of the bandwidth", weights / ns / read.gb_s, asked)


@pytest.mark.parametrize("isa", ISAS)
def test_a_context_of_1024(isa):
    model = load(backend="cpu", isa=isa)
    empty, filled = medians_ns(Decode(model, 1), Decode(model, 1024))
    report(f"{isa}: decoding at 1,024 tokens of context, of that at none", empty / filled, 0.75)


def test_half_the_layers(model):
    half = load(drop=range(10, 25), backend="cpu")
    whole_ns, half_ns = medians_ns(Decode(model), Decode(half))
    predicted = whole_ns * half.runtime.weight_bytes / model.runtime.weight_bytes
    report(
        "decoding with half the layers, of what the bytes left predict", predicted / half_ns, 0.9
    )


def test_two_threads(model):
    lone = load(backend="cpu", threads=1)
    nbytes = model.runtime.weight_bytes
    reads = [Read(nbytes, threads) for threads in (1, 2)]
    one_ns, two_ns = medians_ns(Decode(lone), Decode(load(backend="cpu", threads=2)), *reads)[:2]
    report(
        "two threads, of the read's gain", one_ns / two_ns / (reads[1].gb_s / reads[0].gb_s), 0.85
    )


def test_more_threads():
    """Two threads stream weights faster than one; prints the parts of their steps, and what these
    predict for more."""
    one, nbytes, items = scaling.measured(DEFAULT, 1)
    two, _, _ = scaling.measured(DEFAULT, 2)
    print("\nmeasured:")
    print("\n".join(scaling.parts_table(one, two)))
    print("\nmeasured on 1 and 2 threads, else predicted; tok/s by what memory is assumed to give:")
    print("\n".join(scaling.table(one, two, nbytes, items)))
    if said := scaling.remark(two):
        print(said)
    assert two.stream < one.stream


BATCH_OF_8 = {"avx512": 0.6, "avx2": 0.75}


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa in (ISAS[0], *BATCH_OF_8)])
def test_a_batch_of_8(isa):
    """By the best instruction set; by VNNI, for which the first bound was set, without the tile
    registers that double the prefill; and by AVX2. Of greedy
    steps, as `generate` runs them; the speed with all logits is printed beside it."""
    path = locate(DEFAULT)
    checkpoint = open_checkpoint(path)
    model = Model(path, CpuRuntime.load(checkpoint, checkpoint.config, isa=isa))
    ids = torch.randint(model.config.vocab_size, (1, 512))
    cache = model.runtime.new_cache(1, 512)

    def prefill() -> None:
        cache.truncate(0)
        model.runtime.forward(ids, cache)

    batch = Decode(model, batch=8)
    logits_ns, chosen_ns, prefill_ns = medians_ns(batch, batch.choose, prefill)
    batch_tok_s, prefill_tok_s = 8 * TOKENS / chosen_ns * 1e9, 512 / prefill_ns * 1e9
    print(f"\n{isa}: prefill {prefill_tok_s:.0f} tok/s, a batch of 8 {batch_tok_s:.0f}", end="")
    print(f", with all logits {prefill_ns / logits_ns * 8 * TOKENS / 512:.1%} of it", end="")
    asked = BATCH_OF_8.get(isa, 0.6)
    report("a batch of 8, of the prefill", batch_tok_s / prefill_tok_s, asked)


def test_opening(tmp_path):
    checkpoint = open_checkpoint(locate(DEFAULT))
    pack(checkpoint, checkpoint.config, tmp_path / "packed", Recipe("keep", head=None))
    command = [sys.executable, "-c", OPEN, str(tmp_path / "packed")]
    runs = [
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        for _ in range(5)
    ]
    opened_ms, first_ms = (median(map(float, times)) for times in zip(*runs, strict=True))
    print(f"\na packed directory, opened: {opened_ms:.0f} ms, asked 50", end="")
    print(f"; to the first token: {first_ms:.0f} ms, asked 300")
    assert opened_ms <= 50 and first_ms <= 300


class Timed:
    """A native decoder whose greedy steps are timed."""

    def __init__(self, decoder) -> None:
        self.decoder = decoder
        self.ns: list[int] = []

    def __getattr__(self, name: str):
        return getattr(self.decoder, name)

    def greedy(self, *call) -> list[int]:
        start = perf_counter_ns()
        ids = self.decoder.greedy(*call)
        self.ns.append(perf_counter_ns() - start)
        return ids


def test_python(model):
    """What generate() adds to the native step: bindings, sampling, text."""
    model.runtime.decoder = timed = Timed(model.runtime.decoder)
    result = model.generate("The sea", max_new_tokens=256, ignore_eos=True)
    model.runtime.decoder = timed.decoder
    steps = zip(result.timings.step_ns, timed.ns, strict=True)
    found = median(1 - native_ns / step_ns for step_ns, native_ns in steps)
    print(f"\nPython and bindings: {found:.1%} of a token, asked 3%")
    assert found <= 0.03
