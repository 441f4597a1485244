"""Weights of other formats, held without loss: unpacking is the source's formula in float32."""

import math

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf import quants as gguf_quants

from engine.kernels.w4 import from_hf
from engine.kernels.w4.format import NF4, unpack, unpack_codes, validate
from engine.kernels.w4.from_gguf import BLOCKS, from_blocks


def assert_same_bits(expected: torch.Tensor, got: torch.Tensor) -> None:
    assert expected.dtype == got.dtype == torch.float32 and expected.shape == got.shape
    assert torch.equal(expected.view(torch.int32), got.view(torch.int32))


def words(rng: torch.Generator, *shape: int) -> torch.Tensor:
    """int32 of any bit pattern."""
    return torch.randint(-(1 << 31), 1 << 31, shape, generator=rng).int()


def some_scales(rng: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=rng) / 16


def field(word: torch.Tensor, index: int, bits: int) -> int:
    return (int(word) & 0xFFFFFFFF) >> (bits * index) & ((1 << bits) - 1)


# ---- GGUF: the gguf package defines the formula ----

HALVES = {  # byte offsets of the float16 fields of a block
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0],
    "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
}  # fmt: skip


def random_blocks(rng: torch.Generator, name: str, n: int, k: int) -> torch.Tensor:
    """Any bytes, but for float16 fields: any finite value, subnormals and -0 included."""
    weights, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    data = torch.randint(0, 256, (n, k // weights, nbytes), generator=rng, dtype=torch.uint8)
    for offset in HALVES[name]:
        high = data[..., offset + 1]
        high[(high & 0x7C) == 0x7C] &= 0x83  # Inf and NaN
    return data.reshape(n, -1)


@pytest.mark.parametrize("n, blocks", [(1, 1), (3, 5)])
@pytest.mark.parametrize("name", BLOCKS)
def test_gguf_random_blocks(name, n, blocks, rng):
    k = blocks * BLOCKS[name].weights
    data = random_blocks(rng, name, n, k)
    packed = validate(from_blocks(name, (n, k), data))
    expected = gguf_quants.dequantize(data.numpy(), GGMLQuantizationType[name])
    assert_same_bits(torch.from_numpy(expected), unpack(packed))
    assert packed.shape == (n, k)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_gguf_quantised_gaussian(name, rng):
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


# ---- GPTQ: the published formula, read word by word ----


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


# ---- AWQ: nibble i of word c holds column 8c + [0, 2, 4, 6, 1, 3, 5, 7][i] ----


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


# ---- compressed-tensors: written and read by its own library ----


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


# ---- bitsandbytes NF4 ----


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


# ---- what cannot be read is named ----


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
            r"NF4 codes of \(2, 64\) are 64 uint8, found 9",
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
