"""What stands behind the checks in Python all the same: the native decoder refuses by itself."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch
from support import tiny
from support.gguf_blocks import mild_blocks
from support.packed import random_packed

from engine.checkpoint import open_checkpoint
from engine.errors import InputError
from engine.kernels import native

if native.error("cpu") is not None:
    pytest.skip(f"engine._cpu does not load: {native.error('cpu')}", allow_module_level=True)

from engine.kernels.w4.cpu import CpuWeight, isas, matmul
from engine.kernels.w4.format import Spec, unpack
from engine.kernels.w4.tiled import Tiled
from engine.reference.cache import KVCache
from engine.runtime.cpu import CpuRuntime, native_layer, native_outer, rules, spans
from engine.runtime.reference import ReferenceRuntime


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny.write("llama", path, 1)
    return open_checkpoint(path)


def decoder(config, **changes):
    return native.load("cpu").Decoder(rules(config, "exact") | changes, isas()[0], 1)


def set_outer(made, config, matrices, vectors, embedding) -> None:
    made.set_outer(matrices, spans(vectors), native.span(embedding), *embedding.shape)


@pytest.mark.parametrize("shape", [(-1, 0), (1, 0), (0, -1), (0, 1)])
def test_an_embedding_of_another_size(shape, checkpoint):
    config = checkpoint.config
    matrices, vectors, embedding = native_outer(checkpoint, config)
    other = torch.empty(embedding.shape[0] + shape[0], embedding.shape[1] + shape[1])
    with pytest.raises(ValueError, match="embedding (rows|columns): expected [0-9]+, found"):
        set_outer(decoder(config), config, matrices, vectors, other)
    set_outer(decoder(config), config, matrices, vectors, embedding)


def test_nothing_of_what_was_refused_is_kept(checkpoint):
    config = checkpoint.config
    made, (matrices, vectors, embedding) = decoder(config), native_outer(checkpoint, config)
    with pytest.raises(ValueError, match="embedding rows"):
        set_outer(made, config, matrices, vectors, embedding[:2])
    with pytest.raises(ValueError, match="no matrix embedding"):
        made.set_outer(matrices, spans(vectors), None, 0, 0)
    layer, norms = native_layer(checkpoint, config, 0)
    with pytest.raises(ValueError, match="no matrix down"):
        made.add_layer({r: m for r, m in layer.items() if r != "down"}, spans(norms), 0, -1, 0)
    assert made.nbytes == 0
    made.add_layer(layer, spans(norms), 0, -1, 0)
    cache, given = made.new_cache("float32", 1), native.span
    tokens, lengths = torch.tensor([1]), torch.zeros(1, 1, dtype=torch.int64)
    logits = torch.empty(1, 1, config.vocab_size)
    with pytest.raises(ValueError, match="layers"):
        made.forward(cache, given(tokens), 1, 1, given(lengths), None, [], False, given(logits))


def test_a_final_norm_that_is_absent(checkpoint):
    config = checkpoint.config
    matrices, _, embedding = native_outer(checkpoint, config)
    with pytest.raises(ValueError, match="no vector norm"):
        set_outer(decoder(config), config, matrices, {}, embedding)


@pytest.mark.parametrize(("rule", "sizes"), [("head", (8, 8)), ("all", (48, 16))])
def test_norms_of_q_and_k_that_are_absent(rule, sizes, checkpoint):
    matrices, vectors = native_layer(checkpoint, checkpoint.config, 0)
    made = decoder(checkpoint.config, qk_norm=rule)
    norms = {name: torch.ones(n) for name, n in zip(("q_norm", "k_norm"), sizes, strict=True)}
    for some in ({}, *({name: norm} for name, norm in norms.items())):
        with pytest.raises(ValueError, match="no vector q_norm or k_norm"):
            made.add_layer(matrices, spans(vectors | some), 0, -1, 0)
    made.add_layer(matrices, spans(vectors | norms), 0, -1, 0)


@pytest.mark.parametrize(("window", "rope_dim"), [(-1, 0), (0, -2), (0, 3), (0, 10)])
def test_a_layer_that_rotates_or_sees_what_is_not_there(window, rope_dim, checkpoint):
    assert checkpoint.config.head_dim == 8
    matrices, vectors = native_layer(checkpoint, checkpoint.config, 0)
    with pytest.raises(ValueError, match="(window|rope_dim): expected"):
        decoder(checkpoint.config).add_layer(matrices, spans(vectors), window, 0, rope_dim)


@pytest.mark.parametrize("role", ["q", "k", "v", "o", "gate", "up", "down"])
def test_matrices_that_are_absent_or_of_another_size(role, checkpoint):
    matrices, vectors = native_layer(checkpoint, checkpoint.config, 0)
    made, vectors = decoder(checkpoint.config), spans(vectors)
    with pytest.raises(ValueError, match=f"no matrix {role}"):
        made.add_layer({r: m for r, m in matrices.items() if r != role}, vectors, 0, -1, 0)
    n, k = matrices[role].shape
    for shape, what in (((n + 1, k), "outputs"), ((n, k + 1), "inputs")):
        other = CpuWeight.from_tensor(torch.zeros(shape)).tiles
        with pytest.raises(ValueError, match=f"{role} {what}: expected"):
            made.add_layer(matrices | {role: other}, vectors, 0, -1, 0)


def test_vectors_of_another_size(source):
    checkpoint = source("phi2-qk-norm-tied")  # with every bias
    config = checkpoint.config
    matrices, vectors = native_layer(checkpoint, config, 0)
    outer, ends, _ = native_outer(checkpoint, config)
    for given in (vectors, ends):
        for role, vector in given.items():
            for other in (vector[:-1], torch.cat((vector, vector[:1]))):
                changed, made = given | {role: other.contiguous()}, decoder(config)
                with pytest.raises(ValueError, match=f"{role}: expected {len(vector)}, found"):
                    if given is vectors:
                        made.add_layer(matrices, spans(changed), 0, -1, 0)
                    else:
                        made.set_outer(outer, spans(changed), None, 0, 0)


@pytest.fixture(scope="module")
def runtime(checkpoint):
    return CpuRuntime.load(checkpoint, checkpoint.config, 1)


def test_a_cache_of_another_model(checkpoint, runtime, tmp_path):
    tiny.write("llama", tmp_path, 1, num_attention_heads=4, num_key_value_heads=4)
    other = open_checkpoint(tmp_path)
    wide = CpuRuntime.load(other, other.config, 1)
    again = CpuRuntime.load(checkpoint, checkpoint.config, 1)
    foreign = [wide.new_cache(1), again.new_cache(1), KVCache(checkpoint.config, 1), None]
    for cache in foreign:
        with pytest.raises(InputError, match="cache: expected one that this model made"):
            runtime.forward(torch.tensor([[1, 2]]), cache)
        with pytest.raises(InputError, match="cache: expected one that this model made"):
            runtime.greedy([1], cache)
    with pytest.raises(InputError, match="cache: expected one that this model made"):
        ReferenceRuntime.load(other, other.config).forward(torch.tensor([[1]]), foreign[2])


def test_tensors_of_another_device(runtime):
    with pytest.raises(InputError, match="tokens: expected a tensor on the CPU, found one on meta"):
        runtime.forward(torch.empty(1, 2, dtype=torch.int64, device="meta"), runtime.new_cache(1))


def call(runtime, **changes):
    """One native step, with some of what it is handed replaced."""
    cache, tokens = runtime.new_cache(1), torch.tensor([[1, 2, 3]])
    out = torch.empty(1, 1, runtime.config.vocab_size)
    tables = runtime._angles.tables(3).tables
    given = {"tokens": tokens, "lengths": cache.lengths, "chosen": None, "logits": out} | changes
    angles = changes.get("angles", tables)
    spans = {name: native.span(given[name]) for name in ("tokens", "lengths", "chosen", "logits")}
    return runtime.decoder.forward(
        cache.pages, spans["tokens"], 1, 3, spans["lengths"], spans["chosen"],
        [native.span(table) for table in angles], False, spans["logits"],
    )  # fmt: skip


WRONG = {
    "few tokens": {"tokens": torch.tensor([[1, 2]])},
    "narrow tokens": {"tokens": torch.tensor([[1, 2, 3]], dtype=torch.int32)},
    "no tokens": {"tokens": None},
    "few lengths": {"lengths": torch.zeros(1, 3, dtype=torch.int64)},
    "negative lengths": {"lengths": torch.full((1, 4), -5)},
    "lengths without end": {"lengths": torch.full((1, 4), 2**63 - 2)},
    "few logits": {"logits": torch.empty(1, 1, tiny.VOCAB - 1)},
    "half logits": {"logits": torch.empty(1, 1, tiny.VOCAB, dtype=torch.float16)},
    "logits elsewhere": {"logits": torch.empty(1, 1, tiny.VOCAB, device="meta")},
    "few choices": {"chosen": torch.ones(1, 3, dtype=torch.bool)},
    "short angles": {"angles": [torch.zeros(2, 8)]},
    "no angles": {"angles": []},
    "double angles": {"angles": [torch.zeros(9, 8, dtype=torch.float64)]},
}


@pytest.mark.parametrize("what", WRONG)
def test_extents(what, runtime):
    assert call(runtime) == 1
    with pytest.raises(ValueError):
        call(runtime, **WRONG[what])


def test_extents_of_a_matrix():
    cpu, weight = native.load("cpu"), torch.ones(20, 32)
    span = native.span
    tiles = cpu.TiledMatrix(span(weight), 20, 32, 1)
    with pytest.raises(ValueError, match="weights: expected 672 elements, found 640"):
        cpu.TiledMatrix(span(weight), 21, 32, 1)
    x, y = torch.ones(3, 32), torch.empty(3, 20)
    cpu.w4_matmul(span(x), 3, 32, tiles, span(y), 20, None, "exact", isas()[0], 1)
    assert torch.equal(y, torch.full((3, 20), 32.0))
    for changed in ({"x": x[:2]}, {"y": y[:2]}, {"bias": torch.ones(19)}, {"x": x.to("meta")}):
        given = {"x": x, "y": y, "bias": None} | changed
        with pytest.raises(ValueError, match=f"{next(iter(changed))}: expected"):
            cpu.w4_matmul(
                span(given["x"]), 3, 32, tiles, span(given["y"]), 20, span(given["bias"]),
                "exact", isas()[0], 1,
            )  # fmt: skip
    with pytest.raises(ValueError, match="out: expected"):
        tiles.rows(0, 20, span(torch.empty(19, 32)), 1)


def test_a_decoder_that_is_not_whole(checkpoint):
    config = checkpoint.config
    made, outer = decoder(config), native_outer(checkpoint, config)
    with pytest.raises(ValueError, match="a cache is of layers, found none"):
        made.new_cache("float32", 1)
    matrices, vectors = native_layer(checkpoint, config, 0)
    made.add_layer(matrices, spans(vectors), 0, -1, 0)
    cache, tokens = made.new_cache("float32", 1), torch.tensor([1])
    logits = torch.empty(1, 1, config.vocab_size)

    def step(slots: int) -> int:
        lengths, given = torch.zeros(1, slots, dtype=torch.int64), native.span
        return made.forward(
            cache, given(tokens), 1, 1, given(lengths), None, [], False, given(logits)
        )

    with pytest.raises(ValueError, match="layers"):
        step(1)
    set_outer(made, config, *outer)
    with pytest.raises(ValueError, match="set_outer: expected one call"):
        set_outer(made, config, *outer)
    assert step(1) == 1
    made.add_layer(matrices, spans(vectors), 0, -1, 0)
    with pytest.raises(ValueError, match="cache"):
        step(2)


def test_bytes_that_are_no_tiles(rng):
    """They come in pickles and state dicts too."""
    cpu = native.load("cpu")
    packed = random_packed(rng, 32, 64, Spec(4, 32, "symmetric"))
    whole = CpuWeight.from_packed(packed).to_bytes()
    assert cpu.TiledMatrix(bytes=native.span(whole)).shape == (32, 64)
    refused = 0
    for at in range(0, 512, 4):
        for value in (0, 1, -1, 1 << 20, 0x7FFFFFFF):
            other = torch.empty(len(whole) + 64, dtype=torch.uint8)
            start = -other.data_ptr() % 64
            other = other[start : start + len(whole)].copy_(whole)
            other[at : at + 4].view(torch.int32)[0] = value
            try:
                tiles = cpu.TiledMatrix(bytes=native.span(other))
            except ValueError:
                refused += 1
            else:
                out = torch.empty(tiles.shape)
                tiles.rows(0, len(out), native.span(out), 1)
    assert refused > 20


def test_columns_in_bytes_that_are_none_of_the_matrix(rng):
    packed = random_packed(rng, 20, 64, Spec(4, 32, "minimum"), permuted=True)
    whole = CpuWeight.from_packed(packed).to_bytes()
    assert torch.equal(whole[-256:].view(torch.int32), packed.perm)
    for column in (-1, 64, 1 << 30):
        other = whole.clone()
        other[-256:].view(torch.int32)[5] = column
        with pytest.raises(ValueError, match="a column that is none of the matrix's"):
            CpuWeight.from_bytes(other)
    with pytest.raises(ValueError, match=f"tiles must have {len(whole)} bytes"):
        CpuWeight.from_bytes(torch.cat((whole, whole[:64])))


def test_tiles_take_and_give_their_own_shape_alone(rng):
    """Neither rows and columns that they lack nor a permutation that one of both has, nor what is
    stored otherwise."""
    cpu, spec = native.load("cpu"), Spec(4, 32, "symmetric")
    shapes = ((32, 64, False), (48, 64, False), (16, 64, False), (32, 32, False), (32, 64, True))
    arrays = [random_packed(rng, *shape[:2], spec, shape[2]) for shape in shapes]
    others = (Spec(4, 64, "symmetric"), Spec(8, 32, "symmetric"), Spec(4, 32, "zero"))
    for other in (*others, Spec(4, 32, "symmetric", torch.float32)):
        arrays.append(random_packed(rng, 32, 64, other))
    given = [cpu.Packed(**packed.native_fields()) for packed in arrays]
    tiles = [cpu.TiledMatrix(packed, 1) for packed in given]
    for other in range(1, len(given)):
        for here, there in ((0, other), (other, 0)):
            for call in (tiles[here].fill, tiles[here].restore):
                with pytest.raises(ValueError, match="tiles of another shape or spec"):
                    call(given[there], 1)


@pytest.mark.parametrize(
    ("name", "spec"),
    [("Q5_1", Spec(8, 32, "minimum")), ("Q6_K", Spec(8, 16, "symmetric", torch.float32))],
)
def test_sixes_become_the_bytes_of_their_own_shape_alone(name, spec, rng):
    tiles = CpuWeight.from_blocks(name, (17, 256), mild_blocks(rng, name, 17, 256)).tiles

    def restore(n: int = 17, k: int = 256, permuted: bool = False, **other) -> None:
        packed = random_packed(rng, n, k, replace(spec, **other), permuted)
        tiles.restore(native.load("cpu").Packed(**packed.native_fields()), 1)

    restore()
    for other in (
        {"n": 16}, {"k": 224}, {"permuted": True}, {"bits": 4}, {"group": 64}, {"scheme": "zero"},
        {"scale_dtype": torch.bfloat16},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="tiles of another shape or spec"):
            restore(**other)


def test_tiles_that_begin_anywhere(rng):
    """Of a file that another wrote: they are copied, and refused where they are borrowed."""
    packed, x = random_packed(rng, 20, 64, Spec(4, 32, "symmetric")), torch.randn(3, 64)
    tiled = Tiled.from_packed(packed)
    tiles, fields = tiled.stored["tiles"], packed.spec.native_fields()
    expected = matmul(x, CpuWeight.from_tiled(tiled))
    for offset in (1, 16, 32):
        room = torch.empty(tiles.numel() + 128, dtype=torch.uint8)
        start = -room.data_ptr() % 64 + offset
        moved = room[start : start + tiles.numel()].view(tiles.shape).copy_(tiles)
        found = matmul(x, CpuWeight.from_tiled(Tiled(packed.spec, packed.shape, {"tiles": moved})))
        assert torch.equal(found, expected)
        with pytest.raises(ValueError, match="tiles must begin on a multiple of 64 bytes"):
            native.load("cpu").TiledMatrix(n=20, k=64, **fields, tiles=native.span(moved))


def test_matrices_of_no_spec(rng):
    packed = random_packed(rng, 32, 64, Spec(4, 32, "symmetric"))
    fields, cpu = packed.native_fields(), native.load("cpu")
    for group in (1, 24, 48, 256):
        with pytest.raises(ValueError, match=f"no matrix has groups of {group}"):
            cpu.Packed(**fields | {"group": group})
    fine = random_packed(rng, 2, 300, Spec(4, 32, "kquant"))  # two pairs of supers a row
    short = native.span(fine.supers.flatten()[:-1])
    with pytest.raises(ValueError, match="supers: expected 8 elements, found 7"):
        cpu.Packed(**fine.native_fields() | {"supers": short})
    zeros = torch.full((32, 2), 255, dtype=torch.uint8)  # which that scheme has not
    tiles = cpu.TiledMatrix(cpu.Packed(**fields | {"zeros": native.span(zeros)}), 1)
    out = torch.empty(32, 64)
    tiles.rows(0, 32, native.span(out), 1)
    assert torch.equal(out, unpack(packed))
    empty = native.span(torch.empty(0, dtype=torch.float64))
    rows = [native.span(torch.ones(1, 8)) for _ in range(2)]
    with pytest.raises(ValueError, match="sums: expected"):
        cpu.angular(rows, [8, 8], "float32", 1, 8, None, empty, empty, None, 1)


MEASURED = """
import sys, threading, torch
from pathlib import Path
from engine.checkpoint import open_checkpoint
from engine.runtime.cpu import CpuRuntime

checkpoint = open_checkpoint(Path(sys.argv[1]))
runtime = CpuRuntime.load(checkpoint, checkpoint.config, 1)
tokens = torch.randint(3, checkpoint.config.vocab_size, (40, 60))  # more than one chunk

def work():
    for _ in range(20):
        runtime.forward(tokens, runtime.new_cache(40))

thread = threading.Thread(target=work)
thread.start()
while thread.is_alive():
    runtime.measure(True)
    runtime.times()
"""


def test_measuring_beside_a_call_of_several_chunks(checkpoint):
    """Which waits for the interpreter between them."""
    command = [sys.executable, "-c", MEASURED, str(checkpoint.path)]
    assert subprocess.run(command, timeout=120).returncode == 0


INTERRUPTED = """
import signal, sys, time, torch
from pathlib import Path
from engine.checkpoint import open_checkpoint
from engine.runtime.cpu import CpuRuntime

checkpoint = open_checkpoint(Path(sys.argv[1]))
runtime = CpuRuntime.load(checkpoint, checkpoint.config, 1)
tokens = torch.randint(3, checkpoint.config.vocab_size, (40, 60))  # more than one chunk
refused = []

def again(*_):
    for call in (lambda: runtime.forward(tokens[:1], runtime.new_cache(1)), runtime.times):
        try:
            call()
        except RuntimeError as error:
            refused.append(str(error))

expected = runtime.forward(tokens, runtime.new_cache(40))
signal.signal(signal.SIGALRM, again)
until = time.monotonic() + 60
while len(refused) < 2 and time.monotonic() < until:
    signal.setitimer(signal.ITIMER_REAL, 1e-3)
    assert torch.equal(runtime.forward(tokens, runtime.new_cache(40)), expected)
assert len(refused) == 2 and set(refused) == {"this model is running already, in this very thread"}
"""


def test_a_signal_amid_a_call_of_several_chunks(checkpoint):
    """Whose handler asks the same model, and would wait for a call that waits for it."""
    command = [sys.executable, "-c", INTERRUPTED, str(checkpoint.path)]
    assert subprocess.run(command, timeout=120).returncode == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_fork_while_another_thread_generates(runtime):
    def steps(count: int) -> torch.Tensor:
        cache = runtime.new_cache(1)
        for _ in range(count):
            out = runtime.forward(torch.tensor([[1, 2, 3, 4]]), cache)
        return out

    expected, ended = steps(3), threading.Event()

    def generate() -> None:
        while not ended.is_set():
            steps(50)

    thread = threading.Thread(target=generate)
    thread.start()
    try:
        for _ in range(20):
            if (child := os.fork()) == 0:
                os._exit(0 if torch.equal(steps(3), expected) else 1)
            until = time.monotonic() + 60
            while (done := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < until:
                time.sleep(0.01)
            if done[0] == 0:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            assert done == (child, 0), "the child hangs"
    finally:
        ended.set()
        thread.join()


FORKED = """
import os, signal, sys, torch
import engine

torch.set_num_threads(2)
model = engine.load(sys.argv[1], backend="cpu", threads=2)
ids = torch.randint(3, model.config.vocab_size, (700,)).tolist()
torch.randn(1 << 20).cos()  # wakes torch's threads, which a child has not
expected = model.generate(ids[:4], max_new_tokens=2).token_ids
if (child := os.fork()) == 0:
    signal.alarm(60)  # of the angles of more positions than before torch would make parts
    model.generate(ids, max_new_tokens=1)
    same = model.generate(ids[:4], max_new_tokens=2).token_ids == expected
    os._exit(0 if same else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_takes_longer_prompts_than_its_parent(source):
    checkpoint = source("llama", max_position_embeddings=16384, head_dim=64)
    tiny.save_tokenizer(checkpoint.path)
    command = [sys.executable, "-W", "ignore", "-c", FORKED, str(checkpoint.path)]
    assert subprocess.run(command, timeout=120).returncode == 0
