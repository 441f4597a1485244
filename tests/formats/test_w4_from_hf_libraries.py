"""compressed-tensors and NF4 weights, held without loss: their libraries are the oracle."""

import math

import numpy as np
import pytest
import torch
from support.bits import assert_same_bits, field, some_scales, words

from engine.kernels.w4 import from_hf
from engine.kernels.w4.format import NF4, unpack, unpack_codes


def library_scheme(bits: int, group: int, symmetric: bool):
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(
        num_bits=bits,
        symmetric=symmetric,
        strategy="channel" if group == -1 else "group",
        group_size=None if group == -1 else group,
    )
    return QuantizationScheme(targets=["Linear"], weights=args)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("n, k, group", [(9, 96, 32), (9, 37, -1), (16, 256, 128), (13, 48, 16)])
@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors(bits, n, k, group, symmetric, dtype, rng):
    """A weight the library compressed, then any words in the same layout."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    library = BaseCompressor.get_value_from_registry("pack-quantized")
    scheme = library_scheme(bits, group, symmetric)
    weight = torch.randn(n, k, generator=rng) + 0.2
    grouped = weight.view(n, -1, k if group == -1 else group)
    scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), scheme.weights)
    state = {"weight": weight, "weight_scale": scale.to(dtype), "weight_zero_point": zero}
    stored = library.compress(state, scheme)
    random = {
        part: words(rng, *tensor.shape)
        for part, tensor in stored.items()
        if part in ("weight_packed", "weight_zero_point")
    }
    for parts in (stored, stored | random):
        # Under float32 scales the library evaluates its formula in float32.
        wide = parts | {"weight_scale": parts["weight_scale"].float()}
        packed = from_hf.compressed_tensors(
            parts["weight_packed"],
            parts["weight_scale"],
            tuple(parts["weight_shape"].tolist()),
            parts.get("weight_zero_point"),
            bits=bits,
            group=group,
        )
        assert_same_bits(library.decompress(wide, scheme)["weight"], unpack(packed))
        assert packed.spec.scheme == ("symmetric" if symmetric else "zero")
    assert bits == 8 or len(unpack_codes(packed).unique()) == 16


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("unused", [False, True], ids=["", "unused"])
def test_compressed_tensors_activation_order(unused, symmetric, rng):
    """weight_g_idx[k] names the scale of input k; words and zero points keep their order."""
    n, k, group = 6, 91, 32
    stored, scale = words(rng, n, 12), some_scales(rng, n, 3).bfloat16()
    zero = None if symmetric else words(rng, 1, 3)
    g_idx = torch.randperm(k, generator=rng).int() // group
    expected = torch.empty(n, k)
    if unused:
        g_idx[:] = -1
    for j in range(n):
        for i in range(k):
            g = i // group if unused else int(g_idx[i])
            z = 8 if symmetric else field(zero[0, g], j, 4)
            q = field(stored[j, i // 8], i % 8, 4)
            expected[j, i] = float(np.float32(q - z) * np.float32(float(scale[j, g])))
    packed = from_hf.compressed_tensors(stored, scale, (n, k), zero, g_idx, group=group)
    assert_same_bits(expected, unpack(packed))
    assert (packed.perm is None) == unused


def nf4_formula(codes, absmax, quant_map, shape, blocksize) -> torch.Tensor:
    flat = np.empty(math.prod(shape), dtype=np.float32)
    for i in range(len(flat)):
        byte = int(codes.flatten()[i // 2])
        q = byte & 15 if i % 2 else byte >> 4
        flat[i] = np.float32(quant_map[q]) * np.float32(absmax[i // blocksize])
    return torch.from_numpy(flat).view(shape)


@pytest.mark.parametrize(
    "n, k, blocksize, group",
    [
        (4, 128, 64, 64),  # blocks end at row ends
        (3, 96, 64, 32),  # gcd(96, 64)
        (5, 80, 64, 16),
        (2, 256, 256, 0),  # a block a row
        (3, 384, 256, 128),
        (3, 37, 128, 0),  # one block holds everything
        (1, 100, 64, 64),  # one row: the last group is short
        (4, 32, 128, 0),
    ],
)
def test_nf4_formula(n, k, blocksize, group, rng):
    codes = torch.randint(0, 256, ((n * k + 1) // 2, 1), generator=rng, dtype=torch.uint8)
    codes[:8, 0] = torch.arange(8) * 34 + 1  # chance may leave out one of the sixteen
    absmax = torch.rand(-(-n * k // blocksize), generator=rng)
    quant_map = torch.tensor(NF4)
    packed = from_hf.nf4(codes, absmax, quant_map, (n, k), blocksize=blocksize)
    assert packed.spec.group == group
    expected = nf4_formula(codes, absmax, quant_map, (n, k), blocksize)
    assert_same_bits(expected, unpack(packed))
    values = from_hf.nf4_values(codes, absmax, quant_map, (n, k), blocksize=blocksize)
    assert_same_bits(expected, values)
    assert len(unpack_codes(packed).unique()) == 16


def test_nf4_blocks_that_no_group_follows(rng):
    """Blocks of 64 in rows of 37: no group, the values all the same."""
    codes = torch.randint(0, 256, (93, 1), generator=rng, dtype=torch.uint8)
    parts = codes, torch.rand(3, generator=rng), torch.tensor(NF4), (5, 37)
    assert from_hf.nf4(*parts, blocksize=64) is None
    assert_same_bits(nf4_formula(*parts, 64), from_hf.nf4_values(*parts, blocksize=64))


@pytest.mark.parametrize("nested", [False, True], ids=["", "nested"])
def test_nf4_of_bitsandbytes(nested, rng):
    functional = pytest.importorskip("bitsandbytes.functional", reason="needs bitsandbytes")
    n, k = 44, 384  # 264 blocks: more than one nested block of 256
    weight = torch.randn(n, k, generator=rng)
    codes, state = functional.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=nested
    )
    stored = state.as_dict(packed=True)
    absmax, quant_map = stored["absmax"], stored["quant_map"]
    assert torch.equal(quant_map, torch.tensor(NF4))
    if nested:
        absmax = from_hf.nf4_absmax(
            absmax,
            stored["nested_quant_map"],
            stored["nested_absmax"],
            nested_blocksize=state.state2.blocksize,
            nested_offset=state.offset.item(),
        )
        theirs = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        assert_same_bits(theirs, absmax)
    packed = from_hf.nf4(codes, absmax, quant_map, (n, k), blocksize=64)
    assert_same_bits(functional.dequantize_4bit(codes, state), unpack(packed))
