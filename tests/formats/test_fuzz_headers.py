"""Damaged headers: an InputError or a sound checkpoint; no crash, no hang, no huge allocation."""

import json
import tracemalloc

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import llama_files

from engine.checkpoint import open_unchecked
from engine.errors import InputError

FAST, SLOW = 100, 2000  # files of each format
# A parsed header costs Python objects: so many bytes for each of the file, and some for any file.
ALLOCATED_PER_BYTE, ALLOCATED_ANYWAY = 32, 1 << 17

EXTREMES = [0, 1, 2, 8, 9, 12, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63]
EXTREMES += [2**64 - 1, 2**64 - 8]


@st.composite
def damages(draw):
    """A list of edits; places are fractions of the header, so that one list fits any file."""
    # hypothesis likes small numbers; scrambled, they are places all over the header
    place = st.integers(0, 2**16 - 1).map(lambda n: (n * 40503 + 12345) % 2**16 / 2**16)
    edit = st.one_of(
        st.tuples(st.just("put"), place, st.sampled_from([1, 4, 8]), st.sampled_from(EXTREMES)),
        st.tuples(st.just("put"), place, st.sampled_from([1, 4, 8]), st.integers(0, 2**64 - 1)),
        st.tuples(st.just("cut"), place, st.integers(1, 64), st.none()),
        st.tuples(st.just("repeat"), place, st.integers(1, 64), st.none()),
        st.tuples(st.just("insert"), place, st.none(), st.binary(min_size=1, max_size=16)),
        st.tuples(st.just("end"), place, st.none(), st.none()),
    )
    return draw(st.lists(edit, min_size=1, max_size=4))


def apply(data: bytes, header: int, edits) -> bytes:
    for kind, place, size, value in edits:
        at = int(place * min(header, len(data)))
        if kind == "put":
            number = (value % 2 ** (8 * size)).to_bytes(size, "little")
            data = data[:at] + number + data[at + size :]
        elif kind == "cut":
            data = data[:at] + data[at + size :]
        elif kind == "repeat":
            data = data[: at + size] + data[at:]
        elif kind == "insert":
            data = data[:at] + value + data[at:]
        else:
            data = data[:at]
    return data


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    """(path, the bytes of a sound file, the length of its header)."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    llama_files.write_tiny(path)
    use(path)  # imports what it needs, which is not to be counted
    assert open_unchecked(path).names()
    data = path.read_bytes()
    return path, data, data.index(b"blk.0.ffn_down.weight") + 60


@pytest.fixture(scope="module")
def safetensors_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("safetensors") / "model.safetensors"
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": torch.ones(4, i) for i in range(6)}
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    config = {"architectures": ["LlamaForCausalLM"], "hidden_size": 8, "num_attention_heads": 2}
    config |= {"num_hidden_layers": 1, "intermediate_size": 16, "vocab_size": 10}
    (path.parent / "config.json").write_text(json.dumps(config))
    use(path.parent)
    assert open_unchecked(path.parent).names()
    data = path.read_bytes()
    return path, data, 8 + int.from_bytes(data[:8], "little")


def check(file, edits) -> None:
    path, data, header = file
    damaged = apply(data, header, edits)
    path.write_bytes(damaged)
    tracemalloc.start()
    try:
        use(path if path.suffix == ".gguf" else path.parent)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < ALLOCATED_PER_BYTE * len(damaged) + ALLOCATED_ANYWAY


def use(path) -> None:
    """Opens a checkpoint and looks at everything in it."""
    try:
        checkpoint = open_unchecked(path)
    except InputError as error:
        assert str(path) in str(error)
        assert len(str(error)) < 2000
        return
    for name in checkpoint.names():
        assert tuple(checkpoint.read(name).shape) == checkpoint.shape(name)
        assert checkpoint.nbytes(name) >= 0
        checkpoint.packed(name)
    if path.suffix == ".gguf":
        for key in checkpoint.file.metadata:
            try:
                checkpoint.file.metadata[key]
            except InputError as error:
                assert "UTF-8" in str(error)


def fuzz(examples: int):
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(
        max_examples=examples, deadline=None, database=None, suppress_health_check=checks
    )


@fuzz(FAST)
@given(edits=damages())
def test_gguf(gguf_file, edits):
    check(gguf_file, edits)


@fuzz(FAST)
@given(edits=damages())
def test_safetensors(safetensors_file, edits):
    check(safetensors_file, edits)


@pytest.mark.slow
@fuzz(SLOW)
@given(edits=damages())
def test_many_ggufs(gguf_file, edits):
    check(gguf_file, edits)


@pytest.mark.slow
@fuzz(SLOW)
@given(edits=damages())
def test_many_safetensors(safetensors_file, edits):
    check(safetensors_file, edits)
