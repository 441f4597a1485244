"""GGUF blocks, held without loss: unpacking is what the gguf package dequantizes."""

from dataclasses import replace

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf import quants as gguf_quants
from support.bits import assert_same_bits
from support.gguf_blocks import HALVES, random_blocks
from support.packed import random_packed

from engine.kernels import native
from engine.kernels.w4.cpu import CpuWeight
from engine.kernels.w4.format import Spec, unpack, unpack_codes, validate
from engine.kernels.w4.from_gguf import BLOCKS, from_blocks
from engine.kernels.w4.tiled import SIXES, Tiled


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


@pytest.mark.parametrize("n, blocks", [(1, 1), (15, 2), (16, 3), (17, 9), (83, 5)])
@pytest.mark.parametrize("name", BLOCKS)
def test_gguf_in_tiles_that_a_file_holds(name, n, blocks, rng):
    """Restored they are the arrays to the bit; where their codes fit into six they are smaller."""
    shape = n, blocks * BLOCKS[name].weights
    data = random_blocks(rng, name, *shape)
    expected, tiled = from_blocks(name, shape, data), Tiled.from_blocks(name, shape, data)
    assert (tiled.spec, tiled.shape) == (expected.spec, shape)
    assert tiled.tensors().keys() == expected.tensors().keys()
    for part, tensor in expected.tensors().items():
        assert tiled.tensors()[part].numpy().tobytes() == tensor.numpy().tobytes(), part
    by_arrays = Tiled.from_packed(expected)
    assert (tiled.gguf is not None) == (name in SIXES) == (tiled.nbytes < by_arrays.nbytes)
    if tiled.gguf is None:
        for part, tensor in by_arrays.stored.items():
            assert torch.equal(tiled.stored[part], tensor), part
    rows = [torch.empty(shape) for _ in range(2)]
    CpuWeight.from_tiled(tiled).rows(0, rows[0])
    assert_same_bits(rows[0], CpuWeight.from_blocks(name, shape, data).rows(0, rows[1]))


def test_gguf_tiles_are_of_their_type_alone(rng):
    """The native functions refuse what would not fit."""
    cpu, shape = native.load("cpu"), (17, 512)
    data = {name: random_blocks(rng, name, *shape) for name in ("Q5_K", "Q6_K")}
    tiled = Tiled.from_blocks("Q6_K", shape, data["Q6_K"])
    with pytest.raises(ValueError, match="tiles of another spec"):
        cpu.fill_gguf(tiled.borrowed(), "Q5_K", native.span(data["Q5_K"]), 0, 1)
    blocks = data["Q6_K"].view(17, -1)
    for part in (blocks[:0], blocks.view(-1)[1:]):
        with pytest.raises(ValueError, match="blocks of another size"):
            cpu.fill_gguf(tiled.borrowed(), "Q6_K", native.span(part), 0, 1)
    longer = torch.cat((blocks, blocks[:1]))
    for rows, first in ((longer, 0), (blocks, 16), (blocks[:5], 0), (blocks[:1], 8), (blocks, -16)):
        with pytest.raises(ValueError, match="rows that are no tiles of the matrix"):
            cpu.fill_gguf(tiled.borrowed(), "Q6_K", native.span(rows.contiguous()), first, 1)
    short = CpuWeight.from_packed(random_packed(rng, 17, 16, Spec(4, 32, "symmetric"))).tiles
    with pytest.raises(ValueError, match="tiles of another spec"):  # columns of half a block
        cpu.fill_gguf(short, "Q4_0", native.span(torch.zeros(18, dtype=torch.uint8)), 0, 1)
    packed = from_blocks("Q5_K", shape, data["Q5_K"])
    with pytest.raises(ValueError, match="tiles of another shape or spec"):
        tiled.borrowed().restore(cpu.Packed(**packed.native_fields()), 1)
    with pytest.raises(ValueError, match="tiles alone have 6 bits"):
        cpu.Packed(**packed.native_fields() | SIXES["Q5_K"])
    for scheme in ("zero", "codebook"):
        with pytest.raises(ValueError, match=f"no matrix of 6 bits is {scheme}"):
            cpu.tile_bytes(k=512, **SIXES["Q5_K"] | {"scheme": scheme})
    with pytest.raises(ValueError, match="no matrix of 8 bits is stepped"):
        cpu.tile_bytes(k=512, **SIXES["Q6_K"] | {"bits": 8})


@pytest.mark.parametrize("name", SIXES)
def test_gguf_sixes_are_restored_to_their_spec_alone(name, rng):
    """Scales of another width would be written over the end, or over half of the array."""
    shape = 17, 512
    sixes = CpuWeight.from_blocks(name, shape, random_blocks(rng, name, *shape))
    spec = BLOCKS[name].spec
    assert sixes.restore(spec).spec == spec
    for field, values in (
        ("scale_dtype", (torch.float16, torch.bfloat16, torch.float32)),
        ("group", (16, 32, 64, 0)),
        ("scheme", ("symmetric", "minimum", "zero")),
        ("bits", (4, 8)),
    ):
        for value in values:
            if value != getattr(spec, field):
                with pytest.raises(ValueError, match="tiles of another shape or spec"):
                    sixes.restore(replace(spec, **{field: value}))


@pytest.mark.parametrize("name", BLOCKS)
def test_gguf_tiled_finds_what_is_not_finite(name, rng):
    shape = 17, 3 * BLOCKS[name].weights
    for offset in HALVES[name]:
        data = random_blocks(rng, name, *shape)
        row = int(torch.randint(17, (), generator=rng))
        data[row, offset : offset + 2] = torch.tensor([1, 0x7C], dtype=torch.uint8)
        with pytest.raises(ValueError, match="x: (scales|mins|supers) must be finite"):
            CpuWeight.from_blocks(name, shape, data, "x")
        with pytest.raises(ValueError, match="x: (scales|mins|supers) must be finite"):
            Tiled.from_blocks(name, shape, data, "x")


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
