"""GPTQ and AWQ weights, held without loss, and what cannot be read is named.

The published formula is evaluated word by word.
"""

import numpy as np
import pytest
import torch
from support.bits import assert_same_bits, field, some_scales, words

from engine.kernels.w4 import from_hf
from engine.kernels.w4.format import unpack, unpack_codes


def gptq_formula(qweight, qzeros, scales, g_idx, bits, offset) -> torch.Tensor:
    """(N, K): scales[G, n] * (q - z), one weight at a time."""
    per_word, mask = 32 // bits, (1 << bits) - 1
    k, n = len(g_idx), scales.shape[1]
    weight = np.empty((n, k), dtype=np.float32)
    for i in range(k):
        for j in range(n):
            g = int(g_idx[i])
            q = field(qweight[i // per_word, j], i % per_word, bits)
            z = (field(qzeros[g, j // per_word], j % per_word, bits) + offset) & mask
            weight[j, i] = np.float32(float(scales[g, j])) * np.float32(q - z)
    return torch.from_numpy(weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("desc_act", [False, True], ids=["", "desc_act"])
@pytest.mark.parametrize("group", [-1, 16, 32, 128])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("offset", [1, 0], ids=["v1", "v2"])
def test_gptq(offset, bits, group, desc_act, dtype, rng):
    n, k = 9, 77  # neither fills its last word, the last group is short
    groups, per_word = (1 if group == -1 else -(-k // group)), 32 // bits
    qweight = words(rng, -(-k // per_word), n)
    qzeros = words(rng, groups, -(-n // per_word))
    qzeros[0, 0] = -1  # every field at its maximum: v1 wraps it to 0
    scales = some_scales(rng, groups, n).to(dtype)
    g_idx = (torch.arange(k) // (group if group > 0 else k)).int()
    if desc_act:
        g_idx = g_idx[torch.randperm(k, generator=rng)]
    packed = from_hf.gptq(
        qweight, qzeros, scales, g_idx, bits=bits, group=group, zero_offset=offset
    )
    assert_same_bits(gptq_formula(qweight, qzeros, scales, g_idx, bits, offset), unpack(packed))
    assert (packed.perm is not None) == (desc_act and groups > 1)
    assert bits == 8 or len(unpack_codes(packed).unique()) == 16
    assert int(packed.zeros[0, 0]) == (0 if offset else (1 << bits) - 1)


@pytest.mark.parametrize("k", [64, 96])
def test_gptq_without_g_idx_takes_the_words_as_rows(k, rng):
    qweight, qzeros = words(rng, k // 8, 5), words(rng, -(-k // 64), 1)
    scales = some_scales(rng, -(-k // 64), 5).half()
    packed = from_hf.gptq(qweight, qzeros, scales, group=64, zero_offset=1)
    expected = gptq_formula(qweight, qzeros, scales, torch.arange(k) // 64, 4, 1)
    assert_same_bits(expected, unpack(packed))
    assert packed.codes.shape[1] % 16 == 0


@pytest.mark.parametrize("bits, offset, word", [(4, 1, 0x77777777), (8, 1, 0x7F7F7F7F)])
def test_gptq_symmetric_zeros_are_dropped(bits, offset, word, rng):
    qweight, scales = words(rng, 64 * bits // 32, 8), some_scales(rng, 2, 8).half()
    qzeros = torch.full((2, 8 * bits // 32), word, dtype=torch.int32)
    packed = from_hf.gptq(qweight, qzeros, scales, bits=bits, group=32, zero_offset=offset)
    assert packed.spec.scheme == "symmetric" and packed.zeros is None
    expected = gptq_formula(qweight, qzeros, scales, torch.arange(64) // 32, bits, offset)
    assert_same_bits(expected, unpack(packed))


@pytest.mark.parametrize("n, k, group", [(16, 70, 32), (8, 33, -1), (24, 128, 64)])
def test_awq(n, k, group, rng):
    groups = 1 if group == -1 else -(-k // group)
    qweight, qzeros = words(rng, k, n // 8), words(rng, groups, n // 8)
    scales = some_scales(rng, groups, n).half()
    expected = torch.empty(n, k)
    for i in range(k):
        for c in range(n // 8):
            for nibble, column in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                g, j = (0 if group == -1 else i // group), 8 * c + column
                q, z = field(qweight[i, c], nibble, 4), field(qzeros[g, c], nibble, 4)
                expected[j, i] = float(np.float32(float(scales[g, j])) * np.float32(q - z))
    packed = from_hf.awq(qweight, qzeros, scales, group=group)
    assert_same_bits(expected, unpack(packed))
    assert len(unpack_codes(packed).unique()) == 16


def test_inputs_that_compressed_tensors_has_in_no_group_are_in_order(rng):
    """It writes -1 for each where the groups were never drawn up."""
    parts = words(rng, 3, 8), some_scales(rng, 3, 2).half(), (3, 64)
    unused = torch.full((64,), -1, dtype=torch.int32)
    packed = from_hf.compressed_tensors(*parts, weight_g_idx=unused, group=32)
    assert packed.perm is None
    assert_same_bits(unpack(from_hf.compressed_tensors(*parts, group=32)), unpack(packed))


@pytest.mark.parametrize(
    "shape, blocksize, group",
    [((3, 37), 64, None), ((4, 64), 64, 0), ((3, 96), 64, 32), ((3, 37), 1 << 50, 0)],
)
def test_nf4_by_blocks_that_run_over_the_ends_of_rows(shape, blocksize, group, rng):
    count = shape[0] * shape[1]
    codes = torch.randint(256, ((count + 1) // 2, 1), generator=rng).byte()
    absmax, levels = some_scales(rng, -(-count // blocksize)), some_scales(rng, 16)
    numbers = torch.stack((codes >> 4, codes & 15), -1).flatten()[:count].int()
    expected = (levels[numbers] * absmax[torch.arange(count) // blocksize]).view(shape)
    parts = codes, absmax, levels, shape
    assert_same_bits(expected, from_hf.nf4_values(*parts, blocksize=blocksize))
    packed = from_hf.nf4(*parts, blocksize=blocksize)
    assert group == (None if packed is None else packed.spec.group)
    if packed is not None:
        assert_same_bits(expected, unpack(packed))


@pytest.mark.parametrize("blocksize", [2, 1 << 50])
def test_nf4_scales_that_are_quantized_again(blocksize, rng):
    absmax = torch.tensor([7, 0, 255], dtype=torch.uint8)
    levels, outer = some_scales(rng, 256), some_scales(rng, 2 if blocksize == 2 else 1)
    options = {"nested_blocksize": blocksize, "nested_offset": 0.25}
    expected = levels[absmax.int()] * outer[torch.arange(3) // blocksize] + 0.25
    assert_same_bits(expected, from_hf.nf4_absmax(absmax, levels, outer, **options))


def gptq_parts() -> dict:
    return {
        "qweight": torch.zeros(8, 16, dtype=torch.int32),
        "qzeros": torch.zeros(2, 2, dtype=torch.int32),
        "scales": torch.ones(2, 16).half(),
        "g_idx": torch.arange(64).int() // 32,
        "group": 32,
        "zero_offset": 1,
    }


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"bits": 3}, ValueError, "bits must be 4 or 8, found 3"),
        ({"group": 48}, ValueError, "group must be one of .*, found 48"),
        ({"group": -5}, ValueError, "found -5"),
        ({"group": 64}, ValueError, r"qzeros must be \(1, 2\), found \(2, 2\)"),
        ({"qweight": torch.zeros(8, 16)}, TypeError, r"qweight must be torch\.int32"),
        ({"qweight": torch.zeros(9, 16).int()}, ValueError, r"\(8, 16\), found \(9, 16\)"),
        ({"scales": torch.ones(2, 16).double()}, ValueError, "found torch.float64"),
        ({"scales": torch.ones(3, 16).half()}, ValueError, r"\(2, 16\), found \(3, 16\)"),
        ({"scales": torch.full((2, 16), torch.nan)}, ValueError, "scales must be finite"),
        ({"scales": torch.full((2, 16), torch.inf)}, ValueError, "scales must be finite"),
        ({"scales": torch.ones(16).half()}, ValueError, r"scales must be a matrix, found \(16,\)"),
        (
            {"g_idx": torch.zeros(2, 32).int()},
            ValueError,
            r"g_idx must be \(64,\), found \(2, 32\)",
        ),
        ({"g_idx": torch.zeros(64).int()}, ValueError, "input 32 is in group 0, expected 1"),
        ({"g_idx": torch.full((64,), 2**31 - 1).int()}, ValueError, "group 2147483647"),
    ],
)
def test_gptq_names_what_disagrees(change, error, words):
    with pytest.raises(error, match=r"^layers\.0: .*" + words):
        from_hf.gptq(**gptq_parts() | change, name="layers.0")


@pytest.mark.parametrize(
    "call, error, words",
    [
        (
            lambda z: from_hf.awq(z(64, 2).int(), z(2, 2).int(), z(2, 24).half(), group=32),
            ValueError,
            r"qweight must be \(64, 3\), found \(64, 2\)",
        ),
        (
            lambda z: from_hf.compressed_tensors(z(4, 8).int(), z(4, 1), (4, 64), group=32),
            ValueError,
            r"weight_scale must be \(4, 2\), found \(4, 1\)",
        ),
        (
            lambda z: from_hf.compressed_tensors(
                z(4, 8).int(), z(4, 2), (4, 64), z(4, 2).int(), group=32
            ),
            ValueError,
            r"weight_zero_point must be \(1, 2\), found \(4, 2\)",
        ),
        (
            lambda z: from_hf.compressed_tensors(
                z(4, 8).int(), z(4, 2), (4, 64), None, z(8), group=32
            ),
            ValueError,
            r"g_idx must be \(64,\), found \(8,\)",
        ),
        (
            lambda z: from_hf.nf4(z(9, 1).byte(), z(2), z(16), (2, 64), blocksize=64),
            ValueError,
            r"4-bit codes of \(2, 64\) are 64 uint8, found 9",
        ),
        (
            lambda z: from_hf.nf4(z(65, 1).byte(), z(2), z(16), (2, 64), blocksize=64),
            ValueError,
            r"4-bit codes of \(2, 64\) are 64 uint8, found 65",
        ),
        (
            lambda z: from_hf.nf4(z(64, 1).byte(), z(3), z(16), (2, 64), blocksize=64),
            ValueError,
            r"absmax must be \(2,\), found \(3,\)",
        ),
        (
            lambda z: from_hf.nf4(z(64, 1).byte(), z(2).half(), z(16), (2, 64), blocksize=64),
            TypeError,
            r"absmax must be torch\.float32",
        ),
        (
            lambda z: from_hf.nf4(z(64, 1).byte(), z(2), z(8), (2, 64), blocksize=64),
            ValueError,
            r"quant_map must be \(16,\), found \(8,\)",
        ),
    ],
)
def test_parts_that_disagree_are_named(call, error, words):
    with pytest.raises(error, match="^weight: .*" + words):
        call(torch.zeros)
