"""GGUF blocks, held without loss: unpacking is what the gguf package dequantizes."""

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf import quants as gguf_quants
from support.bits import assert_same_bits
from support.gguf_blocks import HALVES, random_blocks

from engine.kernels.w4.cpu import CpuWeight
from engine.kernels.w4.format import unpack, unpack_codes, validate
from engine.kernels.w4.from_gguf import BLOCKS, from_blocks


@pytest.mark.parametrize("n, blocks", [(1, 1), (3, 5)])
@pytest.mark.parametrize("name", BLOCKS)
def test_gguf_random_blocks(name, n, blocks, rng):
    k = blocks * BLOCKS[name].weights
    data = random_blocks(rng, name, n, k)
    packed = validate(from_blocks(name, (n, k), data))
    expected = gguf_quants.dequantize(data.numpy(), GGMLQuantizationType[name])
    assert_same_bits(torch.from_numpy(expected), unpack(packed))
    assert packed.shape == (n, k)


@pytest.mark.parametrize("n, blocks", [(1, 1), (15, 2), (16, 3), (17, 9), (83, 5)])
@pytest.mark.parametrize("name", BLOCKS)
def test_gguf_tiled_at_once(name, n, blocks, rng):
    """The CPU holds the same weights by way of the packed format or past it, and in the same layout
    but where that has bytes for what fits into six bits."""
    shape = n, blocks * BLOCKS[name].weights
    data = random_blocks(rng, name, *shape)
    expected = CpuWeight.from_packed(from_blocks(name, shape, data))
    found = CpuWeight.from_blocks(name, shape, data)
    assert_same_bits(expected.rows(0, torch.empty(shape)), found.rows(0, torch.empty(shape)))
    if name[:2] in ("Q5", "Q6"):
        assert found.nbytes < expected.nbytes
    else:
        assert torch.equal(found.to_bytes(), expected.to_bytes())


@pytest.mark.parametrize("name", BLOCKS)
def test_gguf_tiled_finds_what_is_not_finite(name, rng):
    shape = 17, 3 * BLOCKS[name].weights
    for offset in HALVES[name]:
        data = random_blocks(rng, name, *shape)
        row = int(torch.randint(17, (), generator=rng))
        data[row, offset : offset + 2] = torch.tensor([1, 0x7C], dtype=torch.uint8)
        with pytest.raises(ValueError, match="x: (scales|mins|supers) must be finite"):
            CpuWeight.from_blocks(name, shape, data, "x")


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_gguf_quantized_gaussian(name, rng):
    weight = torch.randn(7, 160, generator=rng).numpy()
    data = gguf_quants.quantize(weight, GGMLQuantizationType[name])
    packed = from_blocks(name, weight.shape, torch.from_numpy(data))
    expected = gguf_quants.dequantize(data, GGMLQuantizationType[name])
    assert_same_bits(torch.from_numpy(expected), unpack(packed))
    if packed.spec.bits == 4:
        assert len(unpack_codes(packed).unique()) == 16


def test_gguf_keeps_its_bits():
    """A 4-bit type costs what it costs in the file; Q4_K stores its sub-scales as whole bytes."""
    for name, bits in {"Q4_0": 4.5, "Q4_1": 5, "Q8_0": 8.5, "Q4_K": 4.625}.items():
        data = torch.zeros(2 * 512 // BLOCKS[name].weights * BLOCKS[name].nbytes).byte()
        assert from_blocks(name, (2, 512), data).bits_per_weight == bits


@pytest.mark.parametrize(
    "type_name, shape, count, fill, words",
    [
        ("Q2_K", (1, 256), 84, 0, "GGUF type must be one of .*, found 'Q2_K'"),
        ("Q4_0", (1, 33), 18, 0, "blocks of 32, found K=33"),
        ("Q4_K", (1, 32), 18, 0, "blocks of 256, found K=32"),
        ("Q4_0", (2, 32), 18, 0, r"\(2, 32\) has 36 bytes, found 18"),
        ("Q4_0", (1, 32), 18, 255, "scales must be finite"),
        ("Q4_K", (1, 256), 144, 255, "supers must be finite"),
        ("Q5_K", (1, 256), 176, 255, "scales must be finite"),
    ],
)
def test_gguf_names_bad_blocks(type_name, shape, count, fill, words):
    data = torch.full((count,), fill, dtype=torch.uint8)
    with pytest.raises(ValueError, match="^blk.0: .*" + words):
        from_blocks(type_name, shape, data, "blk.0")
    with pytest.raises(TypeError, match=r"^blk.0: blocks must be uint8, found torch\.int8"):
        from_blocks("Q4_0", (1, 32), torch.zeros(18).char(), "blk.0")
