"""Matrices that the CPU holds as GGUF blocks have them: every type, by every instruction set."""

from itertools import product

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf import quants as gguf_quants
from support.bits import assert_same_bits
from support.close import assert_close, rms_ratio
from support.gguf_blocks import mild_blocks

from engine.kernels import native
from engine.kernels.w4.cpu import MODES, CpuWeight, matmul, matmul_transposed
from engine.kernels.w4.from_gguf import BLOCKS

ISAS = native.load("cpu").isas() if native.error("cpu") is None else []
BOUND = {"exact": 1e-5, "int8": 1e-2}
SIXES = ("Q5_0", "Q5_1", "Q5_K", "Q6_K")  # held as six bits a weight
every_isa = pytest.mark.parametrize("isa", ISAS)
every_mode = pytest.mark.parametrize("mode", MODES)
every_type = pytest.mark.parametrize("name", BLOCKS)


def values(name: str, data: torch.Tensor) -> torch.Tensor:
    """(N, K) float32, as the gguf package has it."""
    return torch.from_numpy(gguf_quants.dequantize(data.numpy(), GGMLQuantizationType[name]))


def pair(rng: torch.Generator, name: str, n: int, blocks: int, isa: str | None = None):
    """(weight, its values)."""
    data = mild_blocks(rng, name, n, blocks * BLOCKS[name].weights)
    wide = values(name, data)
    return CpuWeight.from_blocks(name, wide.shape, data, isa=isa), wide


@every_isa
@every_mode
@every_type
def test_every_size(rng, isa, mode, name):
    for n, blocks in product((1, 15, 16, 17, 33), (1, 2, 3, 9)):
        weight, wide = pair(rng, name, n, blocks, isa)
        for m in (1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 32, 33):
            x = torch.randn(m, wide.shape[1], generator=rng)
            expected = x.double() @ wide.double().T
            size = x.double().abs() @ wide.double().abs().T
            error = (matmul(x, weight, mode=mode) - expected).abs()
            step = wide.double().abs().amax() * x.double().abs().amax(1, keepdim=True)
            assert (error <= BOUND[mode] * (size + step * wide.shape[1] ** 0.5)).all(), (m, n)


@every_type
def test_pieces_of_blocks_are_the_whole(rng, name, monkeypatch):
    shape = 53, 3 * BLOCKS[name].weights
    data = mild_blocks(rng, name, *shape)
    whole, read, row_bytes = CpuWeight.from_blocks(name, shape, data), [], data.numel() // 53
    for piece, count in ((1, 4), (32 * row_bytes, 2), (48 * row_bytes - 1, 2), (1 << 20, 1)):
        monkeypatch.setattr("engine.kernels.w4.cpu.PIECE_BYTES", piece)
        read.clear()
        parts = CpuWeight.from_blocks(name, shape, data, read=lambda: read.append(1))
        assert len(read) == count
        assert torch.equal(parts.to_bytes(), whole.to_bytes()), piece


@every_isa
@every_type
def test_a_matrix_of_a_models_shape(rng, isa, name):
    weight, wide = pair(rng, name, 576, 1536 // BLOCKS[name].weights, isa)
    bias = torch.randn(576, generator=rng)
    for m, mode in product((1, 4, 7, 33), MODES):
        x = torch.randn(m, 1536, generator=rng)
        expected = x.double() @ wide.double().T + bias
        assert_close(f"{name} {mode} {m}", expected, matmul(x, weight, bias, mode), BOUND[mode])


@every_isa
@pytest.mark.parametrize("name", SIXES)
def test_few_rows_of_a_matrix_long_enough_for_four_streams(rng, isa, name):
    n, k = 16 * 277 + 5, 1280  # two claims of 139 tiles, in fours and three
    weight, wide = pair(rng, name, n, k // BLOCKS[name].weights, isa)
    x = torch.randn(5, k, generator=rng)
    plain = matmul(x, weight)
    assert_close("long", x.double() @ wide.double().T, plain, BOUND["int8"])
    for m in range(1, 5):
        assert torch.equal(matmul(x[:m].contiguous(), weight, threads=1), plain[:m])


@every_isa
@pytest.mark.parametrize("name", SIXES)
def test_results_do_not_depend_on_threads_or_rows(rng, isa, name):
    weight, wide = pair(rng, name, 333, 512 // BLOCKS[name].weights, isa)
    x = torch.randn(70, wide.shape[1], generator=rng)
    for mode in MODES:
        first = matmul(x, weight, mode=mode, threads=1)
        assert torch.equal(matmul(x, weight, mode=mode, threads=2), first)
        if mode == "exact" or isa != "amx":  # amx rounds 32 rows or more more finely
            one_by_one = torch.stack([matmul(row, weight, mode=mode) for row in x])
            assert torch.equal(one_by_one, first)


@every_type
def test_vector_instruction_sets_agree_to_the_bit(rng, name):
    """But for AVX2, where bytes and codebooks meet x in 16 bits (test_w4_cpu.py)."""
    results = []
    data = mild_blocks(rng, name, 40, 2 * BLOCKS[name].weights)
    wide = values(name, data)
    x = torch.randn(24, wide.shape[1], generator=rng)
    for isa in ISAS:
        if isa == "generic" or (isa == "avx2" and name in ("Q8_0", "IQ4_NL")):
            continue
        results.append(matmul(x, CpuWeight.from_blocks(name, wide.shape, data, isa=isa)))
    assert all(torch.equal(result, results[0]) for result in results)


@every_isa
@pytest.mark.parametrize("name", SIXES)
def test_the_largest_products_do_not_overflow(isa, name):
    """All codes at their highest, all of x at its peak: the sums that 16 bits hold are fullest."""
    data = torch.full((17, 2 * BLOCKS[name].nbytes), 255, dtype=torch.uint8)
    blocks = data.view(17, 2, BLOCKS[name].nbytes)
    one = torch.tensor([0, 0x3C], dtype=torch.uint8)  # float16
    for at in {"Q5_0": (0,), "Q5_1": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[name]:
        blocks[..., at : at + 2] = one
    wide = values(name, data)
    weight = CpuWeight.from_blocks(name, wide.shape, data, isa=isa)
    for m, sign in product((1, 3, 4, 8, 33), (1, -1)):
        x = torch.full((m, wide.shape[1]), 127.0 * sign)
        expected = x.double() @ wide.double().T
        rounds = isa == "amx" and m == 33  # weights to bfloat16, which has no 31 * 63 - 63
        assert rms_ratio(expected, matmul(x, weight)) < (2**-8 if rounds else 1e-6), (m, sign)


@pytest.mark.parametrize("name", SIXES)
def test_the_gradient_is_of_the_same_values(rng, name):
    weight, wide = pair(rng, name, 33, 2)
    y = torch.randn(5, 33, generator=rng)
    assert_close("gradient", y.double() @ wide.double(), matmul_transposed(y, weight), 1e-5)


@pytest.mark.parametrize("n, blocks", [(1, 1), (15, 2), (16, 3), (17, 9), (83, 5)])
@pytest.mark.parametrize("name", SIXES)
def test_sixes_are_what_the_file_says(rng, name, n, blocks):
    weight, wide = pair(rng, name, n, blocks)
    assert_same_bits(wide, weight.rows(0, torch.empty(wide.shape)))
    again = CpuWeight.from_bytes(weight.to_bytes().clone())
    assert_same_bits(wide, again.rows(0, torch.empty(wide.shape)))


def test_what_a_weight_costs(rng):
    """Bits of a matrix whose rows and columns fill tiles and blocks."""
    costs = {"Q4_0": 4.5, "Q4_K": 4.625, "Q5_0": 6.5, "Q5_1": 7, "Q5_K": 6.625, "Q6_K": 6.5625}
    for name, bits in costs.items():
        weight, wide = pair(rng, name, 64, 2048 // BLOCKS[name].weights)
        assert weight.nbytes * 8 / wide.numel() == pytest.approx(bits, abs=0.02), name
