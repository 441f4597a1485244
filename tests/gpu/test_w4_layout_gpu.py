"""The GPU order of codes, against its drawing."""

import pytest
import torch
from support.packed import random_packed

from engine.kernels.w4.format import Spec, unpack_codes
from engine.kernels.w4.layout_gpu import CHUNK_BYTES, NIBBLES, to_gpu


def unravel(index: int, shape: tuple[int, ...]) -> list[int]:
    return [int(i) for i in torch.unravel_index(torch.tensor(index), shape)]


@pytest.mark.parametrize("k", (1, 31, 32, 127, 128, 129, 300))
def test_four_bits(rng, k):
    packed = random_packed(rng, 3, k, Spec(4, 32, "symmetric"))
    codes, gpu = unpack_codes(packed), to_gpu(packed).codes
    assert gpu.shape == (3, -(-k // 128) * CHUNK_BYTES)
    words = gpu.view(torch.int32).long() & 0xFFFFFFFF
    for column in range(k):
        chunk, place = divmod(column, 128)
        s, half, eight, t, i = unravel(place, (4, 2, 2, 4, 2))
        shift = 4 * NIBBLES.index(4 * half + 2 * eight + i)
        word = words[:, 16 * chunk + 4 * t + s]
        assert torch.equal(word >> shift & 15, codes[:, column].long()), column


@pytest.mark.parametrize("k", (1, 15, 16, 63, 64, 65, 300))
def test_eight_bits(rng, k):
    packed = random_packed(rng, 3, k, Spec(8, 32, "symmetric"))
    codes, gpu = unpack_codes(packed), to_gpu(packed).codes
    assert gpu.shape == (3, -(-k // 64) * CHUNK_BYTES)
    for column in range(k):
        chunk, place = divmod(column, 64)
        s, eight, t, i = unravel(place, (4, 2, 4, 2))
        at = 64 * chunk + 16 * t + 4 * s + 2 * eight + i
        assert torch.equal(gpu[:, at], codes[:, column]), column


def test_other_tensors_stay(rng):
    packed = random_packed(rng, 5, 300, Spec(4, 32, "zero"), permuted=True)
    moved = to_gpu(packed).tensors()
    assert moved.keys() == packed.tensors().keys()
    assert all(moved[name] is packed.tensors()[name] for name in moved if name != "codes")
