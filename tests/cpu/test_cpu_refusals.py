"""The CPU runtime in odd surroundings: rules and lengths that are none, other default dtypes."""

import secrets

import pytest
import torch
from support import tiny
from support.packed import random_packed

import engine
from engine.checkpoint import open_checkpoint
from engine.errors import InputError
from engine.kernels import native
from engine.kernels.angular.accumulate import AngularAccumulator
from engine.kernels.w4.format import Spec
from engine.kernels.w4.tiled import Tiled

if native.error("cpu") is not None:
    pytest.skip(f"engine._cpu does not load: {native.error('cpu')}", allow_module_level=True)

from engine.kernels.w4.cpu import isas
from engine.runtime.cpu import CpuRuntime, rules


@pytest.fixture
def llama(tmp_path):
    tiny.write("llama", tmp_path, secrets.randbits(32))
    return open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("hidden_size", -4, "hidden: expected at least 1, found -4"),
        ("vocab_size", 0, "vocab: expected at least 1, found 0"),
        ("ffn_size", 0, "ffn: expected at least 1, found 0"),
        ("heads", 0, "heads: expected at least 1, found 0"),
        ("kv_heads", 0, "kv_heads: expected at least 1, found 0"),
        ("kv_heads", 4, "heads: expected a multiple of 4, found 6"),
        ("head_dim", 0, "head_dim: expected at least 1, found 0"),
        ("head_dim", 4096, "head_dim: expected at most 1024, found 4096"),
    ],
)
def test_no_decoder_has_such_rules(llama, name, value, sentence):
    given = rules(llama.config, "int8")
    with pytest.raises(ValueError, match=sentence):
        native.load("cpu").Decoder(given | {name: value}, isas()[0], 1)


@pytest.mark.parametrize("length", [-1, 2**63 - 1])
def test_no_cache_has_such_a_length(llama, length):
    cache = CpuRuntime.load(llama, llama.config).new_cache(1)
    with pytest.raises(ValueError, match=f"length: expected a number of positions, found {length}"):
        cache.pages.reserve(length)


def test_a_cache_has_the_pages_that_its_length_needs(llama):
    """Of 128 positions, and of a length in whole pages no more than these."""
    runtime = CpuRuntime.load(llama, llama.config.keep([0]))
    sizes = [runtime.new_cache(1, capacity=length).nbytes for length in (1, 128, 129, 256)]
    assert sizes == [sizes[0], sizes[0], 2 * sizes[0], 2 * sizes[0]]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_torchs_default_device_is_none_of_ours(llama, backend, rng):
    """As of a program that has set its GPU, beside a model on the CPU."""
    tiny.save_tokenizer(llama.path)
    asked = {"max_new_tokens": 5, "ignore_eos": True}
    prompts, drawn = [[3, 5], [7, 8, 9]], {"temperature": 0.7, "repetition_penalty": 1.2, "seed": 3}

    def run() -> tuple:
        model = engine.load(llama.path, backend=backend, device="cpu")
        found = [model.generate(prompts, **asked, **more) for more in ({}, drawn)]
        guessed = model.generate([3, 5, 3, 5, 3], speculate="ngram", **asked).token_ids
        stream = torch.ones(3, 2, 8, device="cpu").cumsum(0)
        distances = AngularAccumulator(backend).update(stream, values=True)
        tiled = Tiled.from_packed(packed).stored["tiles"]
        texts = [[each.token_ids for each in batch] for batch in found]
        return texts, guessed, model([[3, 5, 7]]).tolist(), distances.tolist(), tiled.tolist()

    packed = random_packed(rng, 20, 64, Spec(4, 32, "codebook"))
    expected = run()
    torch.set_default_device("meta")
    try:
        assert run() == expected
    finally:
        torch.set_default_device(None)


def test_other_batches_where_angles_depend_on_lengths(tmp_path):
    tiny.write("llama-dynamic", tmp_path, secrets.randbits(32))
    checkpoint = open_checkpoint(tmp_path)
    runtime = CpuRuntime.load(checkpoint, checkpoint.config)
    cache, tokens = runtime.new_cache(2), torch.full((3, 1), 5)
    words = r"tokens: expected shape \(2, T >= 1\), found \(3, 1\)"
    for call in (runtime.forward, runtime.likeliest, lambda *_: runtime.greedy([5] * 3, cache)):
        with pytest.raises(InputError, match=words):
            call(tokens, cache)


def test_torchs_default_dtype_is_none_of_ours(llama):
    runtime, tokens = CpuRuntime.load(llama, llama.config), torch.tensor([[3, 5, 7]])
    expected = runtime.forward(tokens, runtime.new_cache(1))
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(runtime.forward(tokens, runtime.new_cache(1)), expected)
    finally:
        torch.set_default_dtype(torch.float32)
