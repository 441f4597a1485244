"""The GPU runtime with its kernels interpreted, in a child process of test_gpu_runtime.py."""

import dataclasses
import weakref

import pytest
import torch
from support import mixed, tiny
from support.attention_calls import Attention
from support.close import assert_close
from support.emulated import kernels as emulated_kernels
from support.emulated import run, run_attention
from support.mixed import MixedCheckpoint
from support.w4_calls import Matmul
from triton.runtime import interpreter

import engine
from engine.checkpoint import open_checkpoint
from engine.errors import InputError
from engine.generation import generate
from engine.kernels.layer import cuda as layer_cuda
from engine.kernels.w4 import cuda
from engine.kernels.w4.format import Spec
from engine.kernels.w4.fusion import PLAIN
from engine.kernels.w4.layout_gpu import from_gpu
from engine.options import Options
from engine.runtime import GPU_RUNTIMES
from engine.runtime.gpu import GpuRuntime
from engine.runtime.gpu_cache import Arena, GpuCache
from engine.runtime.reference import ReferenceRuntime
from engine.sample import make_generators, sample

BOUNDS = {torch.bfloat16: 2e-2, torch.float16: 5e-3}
SMALL = {  # two programs of a kernel where there must be two
    "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "num_hidden_layers": 2, "vocab_size": 32,
}  # fmt: skip


def small(case: str) -> dict:
    """What a case is made with here."""
    settings = tiny.CASES[case][1]
    sizes = SMALL | {name: settings[name] for name in ("head_dim",) if name in settings}
    if "layer_types" in settings:
        kinds = settings["layer_types"]
        sizes["layer_types"] = [kinds[0], kinds[-1]]
    if case == "gemma2":  # caps that so small a model reaches
        sizes |= {"attn_logit_softcapping": 0.2, "final_logit_softcapping": 0.5}
    return sizes


@pytest.fixture(autouse=True)
def no_overflow_checks(monkeypatch) -> None:
    """Which the interpreter makes of every sum of integers: a fifth of its time."""
    builder = interpreter.interpreter_builder
    options = dataclasses.replace(builder.options, sanitize_overflow=False)
    monkeypatch.setattr(builder, "options", options)


@pytest.fixture
def emulated(tmp_path, monkeypatch) -> list[tuple[int, torch.dtype]]:
    """Up to 8 rows are multiplied by the CUDA kernels, emulated, where our CUDA kernel has the
    matrix: rows and dtype of x of each call. So is decode attention: (0, dtype). What the kernel
    before writes is out of reach until they have waited for it."""
    executable = emulated_kernels()
    seen = []

    def launch(call, device):
        (x, weights, y, bias, fusion, products), options = call
        beside = {"gate": fusion.gate, "add": fusion.add, "stream": fusion.stream}
        copies = {name: None if t is None else t.clone() for name, t in beside.items()}
        own = Matmul(
            "step", x, from_gpu(weights), bias, dataclasses.replace(fusion, **copies),
            out_dtype=y.dtype, products=products, sums=options.get("sums"),
            out_sums=options.get("out_sums"),
        )  # fmt: skip
        if own.out_sums is not None:
            own = dataclasses.replace(own, out_sums=own.out_sums[: own.sizes.tiles])
        y.copy_(run(executable, [own], tmp_path, overlap=True)[0])
        if fusion.stream is not None:
            fusion.stream.copy_(copies["stream"])
        seen.append((len(x), x.dtype))

    def matmul(x, weights, bias=None, fusion=PLAIN, out_dtype=None):
        y = x.new_empty(len(x), weights.shape[0], dtype=out_dtype or x.dtype)
        launch(((x, weights, y, bias, fusion, x.dtype), {}), x.device)
        return y

    def describe_attention(qkv, store, table, positions, live, y, *, parts, counters, **options):
        buffers = (qkv, store, table, positions, live, y, counters, parts)
        return Attention(y.shape[1] // store.shape[-1], *buffers, options)

    def attend(call, device):
        run_attention(executable, [call], tmp_path, overlap=True)
        seen.append((0, call.qkv.dtype))

    monkeypatch.setattr(layer_cuda, "launch", attend)
    monkeypatch.setattr(layer_cuda, "describe", describe_attention)
    monkeypatch.setattr(cuda, "launch", launch)
    monkeypatch.setattr(cuda, "describe", lambda *call, **options: (call, options))
    monkeypatch.setattr(cuda, "matmul", matmul)
    return seen


@pytest.fixture
def pair(rng, tmp_path):
    """A function: (runtime, the reference) of a tiny model of weights of every kind, or of some."""

    def make(
        case: str, dtype: torch.dtype, backend: str = "triton", kinds=(*mixed.SPECS, *mixed.PLAIN)
    ):
        seed = int(torch.randint(2**31, (1,), generator=rng))
        tiny.write(case, tmp_path / "model", seed, spread=0.1, **small(case))
        checkpoint = MixedCheckpoint(open_checkpoint(tmp_path / "model"), kinds=kinds)
        gpu = GpuRuntime.load(checkpoint, checkpoint.config, "cpu", dtype, backend)
        return gpu, ReferenceRuntime.load(checkpoint, checkpoint.config)

    return make


class Both:
    """A runtime and the reference side by side, each with a cache; their logits so far.

    Few logits err by twice what many do, so that what is alike is judged together.
    """

    def __init__(self, runtimes, batch: int) -> None:
        self.runtimes, self.batch = runtimes, batch
        self.caches, self.seen = [runtime.new_cache(batch) for runtime in runtimes], []

    def run(self, tokens, slots=None, logits="last") -> None:
        """One call of both: lengths are equal; logits, where there is a token, are kept."""
        calls = zip(self.runtimes, self.caches, strict=True)
        got, expected = (runtime.forward(tokens, c, slots, logits) for runtime, c in calls)
        shown = (tokens if logits == "all" else tokens[:, -1:]) >= 0
        self.seen.append((expected[shown], got[shown]))
        assert torch.equal(self.caches[0].lengths, self.caches[1].lengths)

    def judge(self, name: str) -> None:
        expected, got = (torch.cat(each) for each in zip(*self.seen, strict=True))
        self.seen = []
        assert_close(name, expected, got, BOUNDS[self.runtimes[0].dtype])

    def truncate(self, lengths) -> None:
        for cache in self.caches:
            cache.truncate(lengths)


def draw(rng, *shape: int) -> torch.Tensor:
    return torch.randint(0, SMALL["vocab_size"], shape, generator=rng)


@pytest.mark.slow
@pytest.mark.parametrize("case", tiny.CASES)
def test_every_family(rng, pair, case):
    family(rng, pair(case, torch.bfloat16))


@pytest.mark.slow
@pytest.mark.parametrize("case", tiny.CASES)
def test_every_family_with_cuda_kernels(rng, pair, emulated, case):
    family(rng, pair(case, torch.bfloat16, "cuda"))
    assert (0, torch.bfloat16) in emulated


def family(rng, runtimes) -> None:
    """A prompt, steps, two slot masks."""
    both = Both(runtimes, 2)
    both.run(draw(rng, 2, 14), logits="all")
    both.judge("prompt")
    for _ in range(2):
        both.run(draw(rng, 2, 1))
    for slots in ([[0], [1]], [1]):
        both.truncate(0)
        both.run(draw(rng, 2, 3), slots, "all")
        both.run(draw(rng, 2, 1), slots)
    both.judge("steps and slots")


def test_the_whole_protocol(rng, pair):
    whole_protocol(rng, pair("llama", torch.bfloat16, kinds=(Spec(4, 32, "zero"),)))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("case", ["llama", "gemma3", "phi2"])
def test_the_whole_protocol_with_every_kind_of_weight(rng, pair, case, dtype):
    whole_protocol(rng, pair(case, dtype))


def whole_protocol(rng, runtimes) -> None:
    """Unequal prompts, steps with sequences that have finished, slots, a truncation, greedy ids."""
    both, tokens = Both(runtimes, 3), draw(rng, 3, 11)
    tokens[0, :6], tokens[2, :9] = -1, -1
    both.run(tokens, logits="all")
    both.judge("prompts")
    for step in range(8):
        tokens = draw(rng, 3, 1)
        tokens[[0, 2]] = tokens[[0, 2]] if step < 4 else -1
        both.run(tokens)
    both.truncate([7, 3, 5])
    both.run(draw(rng, 3, 1))
    both.judge("steps, some after a truncation")
    same_ids(rng, both)
    for slots in ([1], [[0, 1], [0], [1]]):
        both = Both(runtimes, 3)
        both.run(draw(rng, 3, 2), slots, "all")
        both.run(draw(rng, 3, 1), slots)
        both.judge(f"slots {slots}")


def same_ids(rng, both) -> None:
    """Greedy ids of sequences, one finished: equal unless the reference's lead is in doubt."""
    tokens = [*draw(rng, 2).tolist(), -1]
    gpu, reference = both.runtimes
    logits = reference.forward(torch.tensor(tokens)[:, None], both.caches[1])[:2, 0]
    (best, second), doubt = logits.topk(2).values.T, BOUNDS[gpu.dtype] * logits.std(1)
    ids = torch.tensor(gpu.greedy(tokens, both.caches[0]))
    assert torch.equal(both.caches[0].lengths, both.caches[1].lengths)
    assert ((ids == logits.argmax(1)) | (best - second < 6 * doubt)).all()  # 6: of two logits


@pytest.mark.slow
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("case", ["llama", "gemma3", "phi2"])
def test_the_whole_protocol_with_cuda_kernels(rng, pair, emulated, case, dtype):
    whole_protocol(rng, pair(case, dtype, "cuda"))
    assert {x for _, x in emulated} == {dtype, torch.float32} and max(m for m, _ in emulated) <= 8
    assert (0, dtype) in emulated


@pytest.mark.slow
@pytest.mark.parametrize("backend", GPU_RUNTIMES)
def test_a_list_outlives_positions_and_caches(rng, pair, request, backend):
    """Replayed with other data in its buffers it gives, to the bit, what a list made anew does."""
    if backend == "cuda":
        request.getfixturevalue("emulated")
    gpu, _ = pair("qwen3", torch.float16, backend)
    prompt, tokens = draw(rng, 1, 60), draw(rng, 1, 8)
    anew, kept, other = (gpu.new_cache(1, 80) for _ in range(3))
    for cache in (anew, kept, other):
        gpu.forward(prompt[:, : 50 if cache is other else 60], cache)
    expected = []
    for token in tokens.split(1, dim=1):
        gpu._steps.clear()
        expected.append(gpu.forward(token, anew))
    (held,) = gpu._steps.values()
    for token, logits in zip(tokens.split(1, dim=1), expected, strict=True):
        assert torch.equal(gpu.forward(token, kept), logits)
        assert not torch.equal(gpu.forward(token, other), logits)
    assert list(gpu._steps.values()) == [held]


def test_an_arena_that_grows(rng, pair):
    """Lists live on while caches fit in; after that they are made anew over the same pages."""
    runtimes = pair("llama", torch.float16, kinds=(Spec(4, 32, "zero"),))
    gpu = runtimes[0]
    first, other = Both(runtimes, 1), Both(runtimes, 1)
    for both in (first, other):
        both.run(draw(rng, 1, 60))
        both.run(draw(rng, 1, 1))
    lists, store = dict(gpu._steps), weakref.ref(gpu.arena.store)
    del other, both
    again = Both(runtimes, 1)  # in the pages that the other gave back
    for both in (again, first):
        both.run(draw(rng, 1, 1))
    assert lists == gpu._steps and gpu.arena.store is store()
    del lists
    first.run(draw(rng, 1, 10))
    assert store() is None  # nothing keeps what was moved from
    for both in (again, first):
        both.run(draw(rng, 1, 1))
        both.judge("after a growth")


def test_which_lists_are_kept(rng, pair, monkeypatch):
    """The latest, while what they point to stays where it is."""
    monkeypatch.setattr("engine.runtime.gpu.KEPT_STEPS", 2)
    gpu, _ = pair("llama", torch.float16, kinds=(Spec(4, 32, "zero"),))
    cache = gpu.new_cache(1)

    def ran(*slots: int):
        cache.truncate(0)
        gpu.forward(draw(rng, 1, 1), cache, slots)
        return gpu._steps[1, slots]

    first = ran(0)
    ran(1)
    assert ran(0) is first
    latest = ran(0, 1)
    assert list(gpu._steps.values()) == [first, latest]
    gpu.angles.version += 1
    assert ran(0) is not first and len(gpu._steps) == 1


def test_draws_are_those_of_logits(rng, pair):
    """From uniforms that are sent with the tokens; a finished sequence draws nothing."""
    gpu, _ = pair("llama", torch.float16, kinds=(Spec(4, 32, "zero"),))
    caches = [gpu.new_cache(3) for _ in range(2)]
    prompt, tokens = draw(rng, 3, 4), [*draw(rng, 2).tolist(), -1]
    for cache in caches:
        gpu.forward(prompt, cache)
    sampling, generators = Options(temperature=1.5, top_p=0.9), make_generators(7, 2)
    logits = gpu.forward(torch.tensor(tokens)[:, None], caches[0])[:2, 0]
    expected = sample(logits, sampling, [[], []], generators).tolist()
    uniforms = [generator.random() for generator in make_generators(7, 2)]
    assert gpu.draw(tokens, caches[1], sampling, [*uniforms, 0.0]) == expected


@pytest.mark.slow
def test_long_contexts(rng, pair):
    """Many pages, grown as they come, beside another cache in the same arena."""
    runtimes = pair("mistral", torch.float16)
    both, other = Both(runtimes, 2), Both(runtimes, 1)
    other.run(draw(rng, 1, 20))
    tokens = draw(rng, 2, 150)
    tokens[1, :70] = -1
    for piece in (tokens, draw(rng, 2, 30), draw(rng, 2, 1)):
        both.run(piece)
        other.run(draw(rng, 1, 1))
    both.judge("pages")
    other.run(draw(rng, 1, 60))
    other.judge("the other")
    held = len(runtimes[0].arena.store)
    del both
    again = Both(runtimes, 2)
    again.run(tokens, logits="all")
    again.judge("in pages that were given back")
    assert len(runtimes[0].arena.store) == held


@pytest.mark.parametrize("permuted", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_stacked_and_permuted_matrices(rng, tmp_path, permuted):
    """q, k and v of one spec are one launch, and what differs stays apart."""
    tiny.write("qwen2", tmp_path, 1, **small("qwen2"))
    stored = open_checkpoint(tmp_path)
    checkpoint = MixedCheckpoint(stored, permuted, kinds=(Spec(4, 32, "zero"),))
    gpu = GpuRuntime.load(checkpoint, checkpoint.config, "cpu", torch.float16)
    parts = {name: len(p.parts) for name, p in gpu.layers[0].projections.items()}
    apart = 3 if permuted else 1  # each has an order of its own
    assert parts == {"qkv": apart, "gate_up": 2 if permuted else 1, "o": 1, "down": 1}
    runtimes = gpu, ReferenceRuntime.load(checkpoint, checkpoint.config)
    both = Both(runtimes, 2)
    both.run(draw(rng, 2, 3), logits="all")
    both.run(draw(rng, 2, 1))
    both.judge("prompt and step")
    assert gpu.launches_per_token == 2 * (5 + (3 if permuted else 0)) + 3
    gpu.measure(True)
    gpu.greedy([1, 2], both.caches[0])
    times = gpu.times()
    gpu.measure(False)
    parts = {"embedding", "qkv", "attention", "o", "up", "down", "head", "choice"}
    assert times.seconds.keys() == parts and times.whole == sum(times.seconds.values())
    weights = sum(times.bytes[name] for name in ("qkv", "o", "up", "down", "head"))
    assert weights == gpu.weight_bytes_per_token - sum(
        norm.nbytes for layer in (gpu.outer, *gpu.layers) for norm in layer.norms.values()
    )
    assert 0 < gpu.weight_bytes_per_token < gpu.weight_bytes


def test_bad_calls_leave_the_model_usable(pair):
    both, one = Both(pair("llama", torch.bfloat16), 2), torch.tensor([[5], [5]])
    gpu, cache = both.runtimes[0], both.caches[0]
    strange = Arena(gpu.config, gpu.device, gpu.dtype)
    for message, call in {
        "expected ids below 32, found 32": lambda: gpu.forward(one + 27, cache),
        "positions, this call needs 257": lambda: gpu.forward(one.repeat(1, 257), cache),
        r"expected shape \(2, T >= 1\), found \(3, 1\)": lambda: gpu.forward(one[[0, 0, 0]], cache),
        "expected ids, found torch.int16": lambda: gpu.forward(one.short(), cache),
        "only stand to the left": lambda: gpu.forward(torch.tensor([[5, -1]] * 2), cache),
        r"ascending numbers in 0-1, found \[3\]": lambda: gpu.forward(one, cache, [3]),
        "'last' or 'all'": lambda: gpu.forward(one, cache, logits="none"),
        "at least 1 sequence": lambda: gpu.new_cache(0),
        "at least 0 positions": lambda: gpu.new_cache(1, -1),
        "cache: expected one that this": lambda: gpu.forward(one, both.caches[1]),
        "found another's": lambda: gpu.forward(one, GpuCache(gpu.config, 2, strange)),
    }.items():
        with pytest.raises(InputError, match=message):
            call()
        assert int(cache.lengths.sum()) == 0
    for call in (
        lambda: gpu.forward(one[[0] * 33], gpu.new_cache(33)),
        lambda: gpu.greedy([5] * 33, gpu.new_cache(33)),
        lambda: generate(gpu, None, [[5]] * 33),
    ):
        with pytest.raises(
            InputError, match="decodes at most 32 sequences at once, found 33: take 32"
        ):
            call()
    both.run(one)
    both.judge("usable")


def test_loaded_by_name(tmp_path):
    tiny.write("llama", tmp_path, 1, **small("llama"))
    tiny.save_tokenizer(tmp_path)
    with engine.load(tmp_path, backend="triton") as model:
        assert model.runtime.name == "triton" and model.runtime.dtype == torch.bfloat16
        found = model.generate([5, 6, 7], max_new_tokens=2, ignore_eos=True)
        assert len(found.token_ids) == 2
    with pytest.raises(InputError, match="triton has float16 and bfloat16, found float32"):
        engine.load(tmp_path, backend="triton", dtype="float32")
