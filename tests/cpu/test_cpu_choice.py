"""Greedy steps of several rows, which leave out what cannot be the largest of a head of bytes,
against the largest of all its logits."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from support import tiny
from support.packed import random_packed

from engine.checkpoint import open_checkpoint
from engine.errors import NotFiniteError
from engine.kernels import native
from engine.kernels.w4.format import Packed, Spec
from engine.sample import likeliest

if native.error("cpu") is not None:
    pytest.skip(f"engine._cpu does not load: {native.error('cpu')}", allow_module_level=True)

from engine.kernels.w4.cpu import isas
from engine.runtime import cpu

VOCAB = 1003  # tiles, and a part of one
BATCHES = (1, 3, 4, 5, 8, 9, 16, 17, 33)
HEADS = {48: (6, 2), 64: (4, 2), 100: (5, 1), 256: (8, 2)}  # of a hidden size
BYTES = Spec(8, 32, "symmetric", torch.float32)


@pytest.fixture
def load(tmp_path, monkeypatch, rng):
    """load(head, isa, case): a tiny model with this head, of the same weights each time."""
    seed = int(torch.randint(1 << 31, (), generator=rng))
    print(f"seed {seed}")
    outer = cpu.outer_weights

    def load(head: Packed | torch.Tensor, isa: str, case: str = "llama") -> cpu.CpuRuntime:
        hidden = head.shape[1]
        sizes = dict(
            hidden_size=hidden,
            num_attention_heads=HEADS[hidden][0],
            num_key_value_heads=HEADS[hidden][1],
        )
        tiny.write(case, tmp_path, seed, vocab_size=VOCAB, **sizes)
        checkpoint = open_checkpoint(tmp_path)
        heads = {"head": head}
        monkeypatch.setattr(
            cpu,
            "outer_weights",
            lambda *of: ((role, heads.get(role, stored)) for role, stored in outer(*of)),
        )
        return cpu.CpuRuntime.load(checkpoint, checkpoint.config, threads=2, isa=isa)

    return load


def assert_likeliest(runtime, rng, batches=BATCHES, steps: int = 3) -> None:
    for batch in batches:
        prompt = torch.randint(3, VOCAB, (batch, 5), generator=rng)
        caches = [runtime.new_cache(batch) for _ in range(2)]
        fed = [likeliest(runtime.forward(prompt, cache)[:, -1]).tolist() for cache in caches][0]
        for _ in range(steps):
            logits = runtime.forward(torch.tensor(fed)[:, None], caches[0])[:, -1]
            fed = runtime.greedy(fed, caches[1])
            assert fed == likeliest(logits).tolist(), batch


def positive(packed: Packed) -> Packed:
    return dataclasses.replace(packed, scales=packed.scales.abs())


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("group", [16, 32, 64, 128, 0])
@pytest.mark.parametrize("hidden", [48, 100, 256])
def test_heads_of_bytes(load, rng, hidden, group, isa):
    scale_dtype = (torch.float16, torch.bfloat16, torch.float32)[group % 3]
    spec = Spec(8, group, "symmetric", scale_dtype)
    head = positive(random_packed(rng, VOCAB, hidden, spec, permuted=group == 64))
    assert_likeliest(load(head, isa), rng)


@pytest.mark.parametrize("isa", isas())
def test_tokens_that_differ_by_low_bits(load, rng, isa):
    """Half of the tokens have the same codes, but for what bounds leave out and little else."""
    head = positive(random_packed(rng, VOCAB, 256, BYTES))
    like = torch.randperm(VOCAB, generator=rng)[: VOCAB // 2]
    near = torch.randint(-1, 2, (len(like), 256), generator=rng)
    head.codes[like] = (head.codes[like[0]] + near).clamp(0, 255).to(torch.uint8)
    head.scales[like] = 8 * head.scales[like[0]]
    assert_likeliest(load(head, isa), rng, steps=12)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("scheme", ["zero", "minimum"])
def test_heads_that_are_not_around_128(load, rng, scheme, isa):
    head = random_packed(rng, VOCAB, 64, Spec(8, 32, scheme))
    assert_likeliest(load(head, isa), rng, batches=(4, 9))


@pytest.mark.parametrize("isa", isas())
def test_scales_of_any_sign(load, rng, isa):
    assert_likeliest(load(random_packed(rng, VOCAB, 64, BYTES), isa), rng)


@pytest.mark.parametrize("isa", isas())
def test_ties_and_a_head_of_zeros(load, rng, isa):
    """Of equal logits the lowest id, in whatever tile."""
    head = positive(random_packed(rng, VOCAB, 64, BYTES))
    like = torch.randperm(VOCAB, generator=rng)[:400]
    head.codes[like], head.scales[like] = head.codes[like[0]].clone(), 9.0
    assert_likeliest(load(head, isa), rng)
    zeros = dataclasses.replace(head, scales=torch.zeros_like(head.scales))
    runtime = load(zeros, isa)
    assert runtime.greedy([5] * 6, runtime.new_cache(6)) == [0] * 6


@pytest.mark.parametrize("isa", isas())
def test_zeros_above_all_that_is_bounded(load, rng, isa):
    """Negative logits beside rows of zeros, whose tiles have higher bounds than zeros alone."""
    head, fed = positive(random_packed(rng, VOCAB, 64, BYTES)), [5, 6, 7, 8]
    runtime = load(head, isa)
    logits = runtime.forward(torch.tensor(fed)[:, None], runtime.new_cache(4))[:, -1]
    head.scales[(logits >= 0).any(0)] = 0
    head.scales[:16] = 0
    runtime = load(head, isa)
    assert runtime.greedy(fed, runtime.new_cache(4)) == [0] * 4


@pytest.mark.parametrize("isa", isas())
def test_a_head_with_a_bias(load, rng, isa):
    """Which no bound knows."""
    head = positive(random_packed(rng, VOCAB, 64, BYTES))
    assert_likeliest(load(head, isa, "phi2"), rng, batches=(4, 9))


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf])
def test_logits_that_are_not_finite(load, rng, value, isa):
    head = positive(random_packed(rng, VOCAB, 64, BYTES))
    head.scales[int(torch.randint(VOCAB, (), generator=rng)), 1] = value
    runtime = load(head, isa)
    with pytest.raises(NotFiniteError):
        runtime.greedy([5, 6, 7, 8], runtime.new_cache(4))


def rounded(x: np.ndarray) -> np.ndarray:
    """x (K,) in blocks of 32 as bounds round it to int8."""
    blocks = x.reshape(-1, 32)
    peaks = np.abs(blocks).max(1, keepdims=True)
    lanes = blocks.reshape(-1, 8, 2, 2)  # of sums in 16 bits: the first or last two of four columns
    sums = np.maximum(np.stack([lanes, -lanes]), 0).sum((2, 4)).max((0, 2))[:, None]
    most = np.minimum(np.float32(127), peaks / sums * np.float32(250))
    return (np.rint(blocks * (most / peaks)) * (peaks / most)).reshape(-1)


@pytest.mark.skipif("avx2" not in isas(), reason="bounds are AVX2's, which is not here")
def test_a_token_at_its_bound(load, rng):
    """One whose codes make of what is left out all that it can be, low bits and the rounding of x
    alike, is just above another, whose bound is far above both."""
    eye = torch.zeros(VOCAB, 256)
    eye[:256] = torch.eye(256)
    reads = load(eye, "avx2")  # float32: its logits are what the head is given
    tokens = torch.randint(3, VOCAB, (10,), generator=rng).tolist()
    for token in tokens:
        x = reads.forward(torch.full((4, 1), token), reads.new_cache(4))[0, 0, :256].numpy()
        near = rounded(x)
        left = x - near
        # high and low bits by the signs of what they meet; those of the largest for the sum alone
        largest = np.isin(np.arange(256), np.argsort(-np.abs(near))[:32])
        high = np.where(largest, near, left) > 0
        codes = np.where(high, 254, 0) + np.where(near > 0, 1, 0)
        head = positive(random_packed(rng, VOCAB, 256, BYTES))
        head.scales.mul_(1e-3)
        top, other = torch.randperm(VOCAB, generator=rng)[:2].tolist()
        head.codes[top], head.scales[top] = torch.from_numpy(codes.astype(np.uint8)), 1.0
        most = float((codes - 128.0) @ x.astype(np.float64))
        assert most > 0
        # of the other's codes the low bits take away, and its scale brings it near
        head.codes[other] = torch.from_numpy(np.where(near > 0, 254, 1).astype(np.uint8))
        sum_of_other = float((head.codes[other].numpy() - 128.0) @ x.astype(np.float64))
        head.scales[other] = most / sum_of_other * (1 - 2e-4)
        runtime = load(head, "avx2")
        logits = runtime.forward(torch.full((4, 1), token), runtime.new_cache(4))[:, -1]
        assert likeliest(logits).tolist() == [top] * 4
        assert runtime.greedy([token] * 4, runtime.new_cache(4)) == [top] * 4
