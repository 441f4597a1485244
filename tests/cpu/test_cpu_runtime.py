"""The CPU runtime against the reference: every family, every kind of weight, every cache dtype."""

import os
import secrets
import subprocess
import sys
import threading

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny
from support.close import assert_close
from support.llama_files import write_tiny
from support.mixed import MixedCheckpoint

from engine.checkpoint import open_checkpoint
from engine.errors import InputError
from engine.kernels import native
from engine.runtime.reference import ReferenceRuntime

if native.error("cpu") is not None:
    pytest.skip(f"engine._cpu does not load: {native.error('cpu')}", allow_module_level=True)

from engine.kernels.w4.cpu import CpuWeight, isas
from engine.kernels.w4.format import Spec
from engine.kernels.w4.from_gguf import BLOCKS
from engine.quantize.methods import rtn
from engine.runtime.cpu import CpuRuntime

LENGTH = 70  # past every window (9-17) and the original contexts (32-64)
EXACT = {"mode": "exact", "cache_dtype": "float32"}
# Of the RMS ratio to the reference in float32.
BOUNDS = {("exact", "float32"): 1e-4, ("int8", "float16"): 3e-2, ("int8", "int8"): 4e-2}


def write(case: str, path, **overrides):
    """A tiny checkpoint of mixed weights and token ids (2, LENGTH), from a printed seed.

    Weights are drawn so wide that rounding activations to int8 costs what it costs a trained
    model: a ratio of 0.013 to 0.018 in the mean, where the default model's is 0.010 to 0.018.
    """
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    tiny.write(case, path, seed, spread=0.1, **overrides)
    return MixedCheckpoint(open_checkpoint(path)), torch.randint(3, tiny.VOCAB, (2, LENGTH))


@pytest.fixture(scope="module", params=tiny.CASES)
def pair(request, tmp_path_factory):
    """(checkpoint, its reference runtime, token ids (2, LENGTH))."""
    checkpoint, ids = write(request.param, tmp_path_factory.mktemp("cpu"))
    return checkpoint, ReferenceRuntime.load(checkpoint, checkpoint.config), ids


@pytest.fixture
def llama(tmp_path):
    checkpoint, ids = write("llama", tmp_path)
    return checkpoint, ReferenceRuntime.load(checkpoint, checkpoint.config), ids


def load(checkpoint, threads: int = 2, **options) -> CpuRuntime:
    return CpuRuntime.load(checkpoint, checkpoint.config, threads, **options)


def steps(runtime, ids: torch.Tensor, cut: int) -> torch.Tensor:
    """Logits of all positions: a prompt of `cut` tokens, single tokens, then four at once."""
    cache, last = runtime.new_cache(len(ids)), ids.shape[1] - 4
    pieces = [ids[:, :cut], *ids[:, cut:last].split(1, dim=1), ids[:, last:]]
    return torch.cat([runtime.forward(piece, cache, logits="all") for piece in pieces], dim=1)


@pytest.mark.parametrize(("mode", "cache_dtype"), BOUNDS)
def test_logits_of_every_family(pair, mode, cache_dtype):
    checkpoint, reference, ids = pair
    runtime, bound = load(checkpoint, mode=mode, cache_dtype=cache_dtype), BOUNDS[mode, cache_dtype]
    whole = reference.forward(ids, reference.new_cache(2), logits="all")
    prompt = runtime.forward(ids, runtime.new_cache(2), logits="all")
    assert_close("prompt", whole, prompt, bound)
    # Prompts of several lengths: one token a row is too small a sample of what rounding costs.
    starts = [ids[:, :length] for length in range(LENGTH - 7, LENGTH + 1)]
    expected, last = (
        torch.cat([each.forward(start, each.new_cache(2)) for start in starts], dim=1)
        for each in (reference, runtime)
    )
    assert_close("last", expected, last, bound)
    if mode == "exact" or runtime.isa != "amx":  # amx rounds 32 rows or more more finely
        assert torch.equal(last[:, -1:], prompt[:, -1:])
    assert_close("steps", steps(reference, ids, 50), steps(runtime, ids, 50), bound)


def test_padding(pair):
    checkpoint, reference, ids = pair
    ids, runtime = ids.clone(), load(checkpoint, **EXACT)
    ids[1, :33] = -1
    caches = [each.new_cache(2) for each in (reference, runtime)]
    expected, got = (
        each.forward(ids, cache, logits="all")
        for each, cache in zip((reference, runtime), caches, strict=True)
    )
    assert_close("padded", expected[ids >= 0], got[ids >= 0], 1e-4)
    assert torch.equal(caches[0].lengths, caches[1].lengths)
    finished = torch.tensor([[5], [-1]])
    expected, got = reference.forward(finished, caches[0]), runtime.forward(finished, caches[1])
    assert_close("one finished", expected[:1], got[:1], 1e-4)
    assert torch.equal(caches[0].lengths, caches[1].lengths)


def test_slots(pair):
    """Each sequence its own, by prompt and by step; a gap in a slot raises as in the reference."""
    checkpoint, reference, ids = pair
    runtime, total = load(checkpoint, **EXACT), len(checkpoint.config.layers)
    for slots in ([0, 2], [[0, total - 1], list(range(total))]):
        caches = [each.new_cache(2) for each in (reference, runtime)]
        for piece in (ids[:, :40], ids[:, 40:41], ids[:, 41:43]):
            expected = reference.forward(piece, caches[0], slots, "all")
            got = runtime.forward(piece, caches[1], slots, "all")
            assert_close(f"slots {slots}", expected, got, 1e-4)
        with pytest.raises(InputError, match="sequence 0 stands at position 43, but slot 1"):
            runtime.forward(ids[:, :1], caches[1])
        for cache in caches:
            cache.truncate([0, 0])
        for again in torch.tensor([[[5, 6, 7], [-1, -1, 5]], [[-1, -1, 5], [5, 6, 7]]]):
            expected, got = reference.forward(again, caches[0]), runtime.forward(again, caches[1])
            assert_close("again from the start, and on", expected, got, 1e-4)
        assert torch.equal(caches[0].lengths, caches[1].lengths)


@pytest.mark.parametrize("mode", ["int8", "exact"])
@pytest.mark.parametrize("case", ["llama", "gemma3", "phi2", "olmo2"])
def test_the_result_does_not_depend_on_threads(tmp_path, case, mode):
    checkpoint, ids = write(case, tmp_path, max_position_embeddings=700)
    cpu = native.load("cpu")
    ids, size = ids.repeat(1, 5), cpu.pool_threads()
    results = []
    try:
        cpu.resize_pool(4)
        for threads in (1, 2, 4, 4):
            runtime = load(checkpoint, threads, mode=mode)
            cache = runtime.new_cache(2)
            pieces = [ids, *ids[:, :4].split(1, dim=1)]  # a prompt, then steps of two and of one
            results.append([runtime.forward(piece, cache) for piece in pieces])
            cache = runtime.new_cache(1)
            results[-1] += [runtime.forward(piece[:1], cache) for piece in pieces]
    finally:
        cpu.resize_pool(size)
    for result in results[1:]:
        assert all(map(torch.equal, results[0], result))


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("case", ["llama", "gemma2"])
@pytest.mark.parametrize(("mode", "cache_dtype"), BOUNDS)
def test_every_instruction_set(tmp_path, case, isa, mode, cache_dtype):
    checkpoint, ids = write(case, tmp_path)
    reference = ReferenceRuntime.load(checkpoint, checkpoint.config)
    runtime = load(checkpoint, mode=mode, cache_dtype=cache_dtype, isa=isa)
    expected, got = steps(reference, ids, 40), steps(runtime, ids, 40)
    assert_close(isa, expected, got, BOUNDS[mode, cache_dtype])


@pytest.mark.parametrize("case", ["llama", "mistral", "gemma3"])
def test_long_contexts(tmp_path, case):
    """Prompts longer than a chunk, contexts of many pages and spans, grown as they come."""
    checkpoint, _ = write(case, tmp_path, max_position_embeddings=2400)
    reference = ReferenceRuntime.load(checkpoint, checkpoint.config)
    runtime, ids = load(checkpoint, **EXACT), torch.randint(3, tiny.VOCAB, (2, 2300))
    ids[1, :300] = -1
    caches = [each.new_cache(2) for each in (reference, runtime)]
    for piece in (ids[:, :1200], ids[:, 1200:2290], *ids[:, 2290:].split(1, dim=1)):
        expected, got = reference.forward(piece, caches[0]), runtime.forward(piece, caches[1])
        assert_close(f"{piece.shape[1]} tokens", expected, got, 1e-4)
    single = [each.new_cache(1) for each in (reference, runtime)]
    for piece in (ids[:1, :2295], *ids[:1, 2295:].split(1, dim=1)):
        expected, got = reference.forward(piece, single[0]), runtime.forward(piece, single[1])
        assert_close("alone", expected, got, 1e-4)
    assert runtime.new_cache(1, capacity=2300).nbytes == single[1].nbytes


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("cache_dtype", ["float16", "int8"])
@pytest.mark.parametrize(
    ("case", "settings"),
    [
        ("llama", {"head_dim": 64, "max_position_embeddings": 500}),
        ("mistral", {"head_dim": 32, "sliding_window": 150, "max_position_embeddings": 500}),
        ("gemma2", {"head_dim": 96, "sliding_window": 37, "max_position_embeddings": 500}),
        ("phi2", {"head_dim": 80, "max_position_embeddings": 500}),
    ],
)
def test_many_queries(tmp_path, case, settings, cache_dtype, isa):
    """Attention of many rows, which may be rounded as well; weights are not, so it stands out."""
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    tiny.write(case, tmp_path, seed, spread=0.1, **settings)  # as `write` does
    checkpoint = open_checkpoint(tmp_path)
    reference = ReferenceRuntime.load(checkpoint, checkpoint.config)
    runtime = load(checkpoint, mode="int8", cache_dtype=cache_dtype, isa=isa)
    ids = torch.randint(3, tiny.VOCAB, (2, 450))
    ids[1, :90] = -1
    caches = [each.new_cache(2) for each in (reference, runtime)]
    pieces: dict[int, list] = {}  # by width: one position of two rows is too small a sample
    for piece in ids.split([101, 33, *[1] * 12, 245, 59], dim=1):
        expected, got = (
            each.forward(piece, cache, logits="all")[piece >= 0]
            for each, cache in zip((reference, runtime), caches, strict=True)
        )
        pieces.setdefault(piece.shape[1], []).append((expected, got))
    for width, pairs in pieces.items():
        expected, got = map(torch.cat, zip(*pairs, strict=True))
        assert_close(f"{width} tokens", expected, got, 2e-2 if cache_dtype == "float16" else 3e-2)


def test_a_batch_of_32(llama):
    checkpoint, reference, _ = llama
    runtime, ids = load(checkpoint, **EXACT), torch.randint(3, tiny.VOCAB, (32, 24))
    ids[torch.arange(24) < torch.arange(32)[:, None] // 2] = -1  # of all lengths
    caches = [each.new_cache(32) for each in (reference, runtime)]
    for piece in (ids[:, :20], *ids[:, 20:].split(1, dim=1)):
        expected, got = reference.forward(piece, caches[0]), runtime.forward(piece, caches[1])
        assert_close("batch", expected, got, 1e-4)


@pytest.mark.parametrize("permuted", [False, True])
def test_plain_and_permuted_weights(tmp_path, permuted):
    tiny.write("qwen2", tmp_path, secrets.randbits(32))
    checkpoint, ids = open_checkpoint(tmp_path), torch.randint(3, tiny.VOCAB, (2, LENGTH))
    checkpoint = MixedCheckpoint(checkpoint, permuted=True) if permuted else checkpoint
    reference = ReferenceRuntime.load(checkpoint, checkpoint.config)
    for mode, cache_dtype in BOUNDS:
        runtime = load(checkpoint, mode=mode, cache_dtype=cache_dtype)
        expected, got = steps(reference, ids, 50), steps(runtime, ids, 50)
        assert_close(mode, expected, got, BOUNDS[mode, cache_dtype])


@pytest.mark.parametrize("isa", isas())
def test_matrices_of_every_gguf_type(tmp_path, isa):
    """As in files of Q4_K_M, Q5_K_M, ..., where matrices that share an input differ in type."""
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    tiny.write("llama", tmp_path, seed, **tiny.WIDE)
    checkpoint = MixedCheckpoint(open_checkpoint(tmp_path), kinds=tuple(BLOCKS))
    ids = torch.randint(3, tiny.VOCAB, (6, LENGTH))  # of two the ratio had a tail: 0.039
    reference = ReferenceRuntime.load(checkpoint, checkpoint.config)
    for mode, cache_dtype in BOUNDS:
        runtime = load(checkpoint, mode=mode, cache_dtype=cache_dtype, isa=isa)
        expected, got = steps(reference, ids, 50), steps(runtime, ids, 50)
        assert_close(mode, expected, got, BOUNDS[mode, cache_dtype])


@pytest.mark.parametrize("isa", isas())
def test_a_cache_in_the_memory_of_others_is_as_new(llama, isa):
    """Memory that a cache leaves is kept for the next, of whatever type. These take megabytes: a
    small one shares a slab with weights, which stay, so that nothing of it is used again."""
    checkpoint, _, ids = llama
    ids = ids.repeat(80, 1)
    runtimes = [load(checkpoint, mode=mode, cache_dtype=dtype, isa=isa) for mode, dtype in BOUNDS]
    expected = [steps(runtime, ids, 50) for runtime in runtimes]
    for other in runtimes:
        for runtime, logits in zip(runtimes, expected, strict=True):
            other.forward(ids, other.new_cache(len(ids)))
            assert torch.equal(logits, steps(runtime, ids, 50))


def test_weight_bytes(llama):
    checkpoint, _, ids = llama
    runtime = load(checkpoint)
    dropped = CpuRuntime.load(checkpoint, checkpoint.config.keep([0, 3]), 1)
    assert 0 < runtime.weight_bytes_per_token <= runtime.weight_bytes
    assert dropped.weight_bytes < runtime.weight_bytes
    reference = ReferenceRuntime.load(checkpoint, checkpoint.config.keep([0, 3]))
    expected = reference.forward(ids, reference.new_cache(2), logits="all")
    got = dropped.forward(ids, dropped.new_cache(2), logits="all")
    assert_close("dropped", expected, got, 3e-2)


def test_of_an_embedding_of_its_own_a_token_reads_a_row(tmp_path, monkeypatch):
    """In however many bits: the share of the bandwidth that `engine run` shows rests on it."""
    tiny.write("llama", tmp_path, secrets.randbits(32))
    checkpoint = open_checkpoint(tmp_path)
    assert not checkpoint.config.tied
    embedding = rtn(checkpoint.read("model.embed_tokens.weight"), Spec(4, 32, "symmetric"))
    monkeypatch.setattr(
        checkpoint, "packed", lambda name: embedding if "embed_tokens" in name else None
    )
    runtime = load(checkpoint)
    own = CpuWeight.from_packed(embedding).nbytes
    assert runtime.weight_bytes_per_token == runtime.weight_bytes - own


def bad_calls(runtime, cache):
    one = torch.tensor([[5], [5]])
    return {
        "expected ids below 160, found 160": lambda: runtime.forward(one + 155, cache),
        "positions, this call needs 257": lambda: runtime.forward(one.repeat(1, 257), cache),
        r"expected shape \(2, T >= 1\), found \(3, 1\)": lambda: runtime.forward(
            torch.full((3, 1), 5), cache
        ),
        r"found \(2,\)": lambda: runtime.forward(one[:, 0], cache),
        "expected ids, found torch.uint8": lambda: runtime.forward(one.byte(), cache),
        r"found \(2, 0\)": lambda: runtime.forward(one[:, :0], cache),
        "only stand to the left": lambda: runtime.forward(torch.tensor([[5, -1]] * 2), cache),
        r"ascending numbers in 0-3, found \[4\]": lambda: runtime.forward(one, cache, [4]),
        "expected 2 lists": lambda: runtime.forward(one, cache, [[0]]),
        "'last' or 'all'": lambda: runtime.forward(one, cache, logits="none"),
        "at least 1 sequence": lambda: runtime.new_cache(0),
    }


def test_bad_calls_leave_the_model_usable(llama):
    checkpoint, _, ids = llama
    runtime = load(checkpoint)
    cache = runtime.new_cache(2)
    expected = runtime.forward(ids, runtime.new_cache(2))
    for message, call in bad_calls(runtime, cache).items():
        with pytest.raises(InputError, match=message):
            call()
        assert int(cache.lengths.sum()) == 0
    assert torch.equal(expected, runtime.forward(ids, cache))


@pytest.mark.parametrize("cache_dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("isa", isas())
def test_what_is_no_number_stays_so_in_the_cache(tmp_path, isa, cache_dtype):
    """A token whose embedding is NaN spoils those behind it, its sequence's alone."""
    tiny.write("llama", tmp_path, 1)
    file = tmp_path / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    tensors["model.embed_tokens.weight"][7] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    checkpoint = open_checkpoint(tmp_path)
    runtime = load(checkpoint, isa=isa, cache_dtype=cache_dtype)
    cache = runtime.new_cache(2)
    prompt = runtime.forward(torch.tensor([[7, 5, 6], [4, 5, 6]]), cache)
    step = runtime.forward(torch.tensor([[9], [9]]), cache)
    for logits in (prompt, step):
        assert logits[0].isnan().all() and logits[1].isfinite().all()


def test_a_length_is_that_of_the_sequences_that_run(tmp_path):
    """Dynamic rotations depend on the longest of them, not on one that has ended."""
    checkpoint, ids = write("llama-dynamic", tmp_path)
    reference = ReferenceRuntime.load(checkpoint, checkpoint.config)
    runtime, found = load(checkpoint, **EXACT), []
    ids = ids[:, :60].clone()
    ids[1, :40] = -1
    for each in (reference, runtime):
        cache = each.new_cache(2)
        each.forward(ids, cache)
        found.append(each.forward(torch.tensor([[-1], [5]]), cache)[1])
    assert_close("the one that runs", *found, 1e-4)


def test_bad_tensors_and_batches(llama):
    checkpoint, _, ids = llama
    runtime = load(checkpoint)
    with pytest.raises(InputError, match="tokens: expected ids, found torch.float32"):
        runtime.forward(torch.tensor([[1.9, 3.7]]), runtime.new_cache(1))
    for batch in (0, -1):
        with pytest.raises(InputError, match=f"batch: expected at least 1 sequence, found {batch}"):
            runtime.new_cache(batch)
    with pytest.raises(ValueError, match="batch: expected 1 to [0-9]+, found"):
        runtime.new_cache(1 << 62)
    slots = range(len(checkpoint.config.layers))
    padded = torch.cat([torch.full((2, 1), -1), ids[:, :3]], dim=1)
    for tokens, words in (
        (padded, "without padding"),
        (ids + tiny.VOCAB, "expected ids below"),
        (ids.repeat(1, 1000), "context: the model holds"),
    ):
        with pytest.raises(InputError, match=words):
            runtime.stream(tokens, runtime.new_cache(2), slots)


def test_bad_options(llama):
    checkpoint = llama[0]
    for options in (
        {"threads": 0}, {"threads": 1.5}, {"threads": "2"}, {"threads": True}, {"mode": "int4"},
        {"cache_dtype": "int2"}, {"cache_dtype": ""}, {"isa": "sse"}, {"isa": ""},
    ):  # fmt: skip
        with pytest.raises(InputError, match=r"expected"):
            load(checkpoint, **options)
    for many in (999, 1 << 40):  # what more would cost is not held for them
        with pytest.warns(UserWarning, match=f"threads: {many} asked for"):
            assert load(checkpoint, many).threads == native.load("cpu").pool_threads()


def test_models_and_threads_side_by_side(llama):
    """Two models, each used from two Python threads with caches of their own."""
    checkpoint, _, ids = llama
    runtimes = [load(checkpoint), load(checkpoint, mode="exact")]
    expected = [steps(runtime, ids, 50) for runtime in runtimes]
    results = [[] for _ in range(4)]

    def work(number: int) -> None:
        results[number] = [steps(runtimes[number % 2], ids, 50) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, result in enumerate(results):
        assert len(result) == 3
        assert all(torch.equal(expected[number % 2], each) for each in result)


def test_a_processor_without_avx2_is_told(llama, monkeypatch):
    checkpoint, reference, ids = llama
    monkeypatch.setattr("engine.runtime.cpu.isas", lambda: ["generic"])
    with pytest.warns(UserWarning, match="no AVX2 here: the generic kernels run"):
        runtime = load(checkpoint, **EXACT)
    whole = reference.forward(ids, reference.new_cache(2), logits="all")
    assert_close("generic", whole, runtime.forward(ids, runtime.new_cache(2), logits="all"), 1e-4)


_LOADING = """
import threading
from pathlib import Path
import torch
from engine.checkpoint import open_checkpoint
from engine.runtime.cpu import CpuRuntime

def private_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

checkpoint = open_checkpoint(Path(PATH))
before, peak, done = private_bytes(), [0], threading.Event()

def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], private_bytes())

watcher = threading.Thread(target=watch)
watcher.start()
runtime = CpuRuntime.load(checkpoint, checkpoint.config, 2)
cache = runtime.new_cache(1, TOKENS)
runtime.forward(torch.arange(TOKENS)[None] % 8, cache)
done.set()
watcher.join()
print(peak[0] - before, runtime.weight_bytes + cache.nbytes)
"""


def test_loading_takes_64_mb_beside_the_weights(tmp_path):
    """An embedding of 134 million weights: its blocks are turned into tiles part by part."""
    vocab, hidden = 65536, 2048

    def enlarge(fields, tensors):
        fields["llama.embedding_length"] = hidden
        fields["tokenizer.ggml.tokens"] = [f"t{i}" for i in range(vocab)]
        fields["tokenizer.ggml.token_type"] = [1] * vocab
        for name, rows in (("q", hidden), ("k", hidden // 2), ("v", hidden // 2)):
            tensors[f"blk.0.attn_{name}.weight"] = np.zeros((rows, hidden), np.float16)
        tensors["blk.0.attn_output.weight"] = np.zeros((hidden, hidden), np.float16)
        for name, shape in (("gate", (64, hidden)), ("up", (64, hidden)), ("down", (hidden, 64))):
            tensors[f"blk.0.ffn_{name}.weight"] = np.zeros(shape, np.float16)
        for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
            tensors[f"{name}.weight"] = np.ones(hidden, np.float32)
        blocks = np.zeros((vocab, hidden // 32 * 34), np.uint8)
        tensors["token_embd.weight"] = (blocks, gguf.GGMLQuantizationType.Q8_0)

    write_tiny(tmp_path / "large.gguf", enlarge)
    hold_to_64_mb(tmp_path / "large.gguf", tokens=48)


def test_a_long_prompt_takes_64_mb_beside_the_weights(tmp_path):
    """512 rows of gate and up would take 134 MB."""
    hidden, ffn = 256, 32768

    def widen(fields, tensors):
        fields["llama.context_length"] = 2048
        fields["llama.embedding_length"], fields["llama.feed_forward_length"] = hidden, ffn
        for name, rows in (("q", hidden), ("k", hidden // 2), ("v", hidden // 2)):
            tensors[f"blk.0.attn_{name}.weight"] = np.zeros((rows, hidden), np.float16)
        tensors["blk.0.attn_output.weight"] = np.zeros((hidden, hidden), np.float16)
        tensors["token_embd.weight"] = np.ones((8, hidden), np.float16)
        for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
            tensors[f"{name}.weight"] = np.ones(hidden, np.float32)
        for name, n, k in (("gate", ffn, hidden), ("up", ffn, hidden), ("down", hidden, ffn)):
            blocks = np.zeros((n, k // 32 * 18), np.uint8)
            tensors[f"blk.0.ffn_{name}.weight"] = (blocks, gguf.GGMLQuantizationType.Q4_0)

    write_tiny(tmp_path / "wide.gguf", widen)
    hold_to_64_mb(tmp_path / "wide.gguf", tokens=1024)


def hold_to_64_mb(path, tokens: int) -> None:
    if not os.path.exists("/proc/self/status"):
        pytest.skip("counts memory as Linux does")
    if "libasan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("AddressSanitizer's memory would count")
    code = f"PATH, TOKENS = {str(path)!r}, {tokens}\n{_LOADING}"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
    private, held = map(int, done.stdout.split())
    print(f"{private / 1e6:.0f} MB, of which weights and cache {held / 1e6:.0f} MB")
    assert private <= held + 64e6
