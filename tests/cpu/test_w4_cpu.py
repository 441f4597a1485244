"""The CPU matmul on packed weights against float64, for every instruction set of this machine."""

import gc
import os
import threading
import weakref
from dataclasses import replace
from itertools import product

import pytest
import torch
from support.close import assert_close, rms_ratio
from support.packed import every_spec, random_packed, spec_id

from engine.kernels import native
from engine.kernels.w4.cpu import MODES, CpuWeight, isas, matmul, matmul_transposed
from engine.kernels.w4.format import IQ4_NL, Spec, unpack
from engine.kernels.w4.tiled import Tiled

ISAS = native.load("cpu").isas() if native.error("cpu") is None else []
BOUND = {"exact": 1e-5, "int8": 1e-2}
BFLOAT = 2**-8  # of a number, to which it is rounded
Q4_1 = Spec(4, 32, "minimum")
# One of every code width, table, group layout and parameter layout.
KINDS = [
    Q4_1,
    Spec(4, 16, "zero", torch.bfloat16),
    Spec(4, 128, "symmetric", torch.float32),
    Spec(4, 0, "codebook"),
    Spec(8, 16, "symmetric", torch.float32),
    Spec(8, 64, "minimum"),
    Spec(4, 32, "kquant"),
]
every_isa = pytest.mark.parametrize("isa", ISAS)
every_mode = pytest.mark.parametrize("mode", MODES)
every_kind = pytest.mark.parametrize("spec", KINDS, ids=spec_id)


def randn(rng: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=rng)


@every_isa
@pytest.mark.parametrize("spec", every_spec(), ids=spec_id)
def test_every_format_agrees_with_float64(rng, isa, spec):
    n, k, permuted = 37, 201, bool(torch.randint(2, (), generator=rng))
    packed = random_packed(rng, n, k, spec, permuted)
    weight, wide = CpuWeight.from_packed(packed, isa), unpack(packed).double()
    for m, mode in product((31, 33), MODES):
        x, bias = randn(rng, m, k), randn(rng, n)
        expected = x.double() @ wide.T + bias
        got = matmul(x, weight, bias, mode)
        assert_close(f"{mode} {m} x {n} x {k}", expected, got, BOUND[mode])


@every_isa
@every_mode
@every_kind
def test_every_size(rng, isa, mode, spec):
    edges = (1, 2, 15, 16, 17, 31, 32, 33)
    for n, k in product((1, 15, 16, 17, 33), (*edges, 63, 257)):
        packed = random_packed(rng, n, k, spec)
        weight, wide = CpuWeight.from_packed(packed, isa), unpack(packed).double()
        for m in (1, 3, 16, 47) if k > 33 else edges:
            x = randn(rng, m, k)
            expected, size = x.double() @ wide.T, x.double().abs() @ wide.abs().T
            error = (matmul(x, weight, mode=mode) - expected).abs()
            # Few outputs pool badly, and a minimum costs its own size where it cancels.
            step = wide.abs().amax() * x.abs().amax(1, keepdim=True).double()
            assert (error <= BOUND[mode] * (size + step * k**0.5) + 1e-5).all(), (m, n, k)


@every_isa
@pytest.mark.parametrize("k", [96, 288, 2048, 2304, 3072])
def test_blocks_of_equal_steps_are_all_rounded_twice(rng, isa, k):
    packed, x = random_packed(rng, 17, k, Q4_1), randn(rng, 3, k)
    x[:, ::32] = 100
    expected = x.double() @ unpack(packed).double().T
    assert_close("equal", expected, matmul(x, CpuWeight.from_packed(packed, isa)), 1e-3)


@every_isa
@every_mode
@every_kind
def test_many_rows_of_columns_that_are_met_in_slices(rng, isa, mode, spec):
    """By AMX, up to 18 blocks at a time: those of 35 begin within a group."""
    packed, x = random_packed(rng, 37, 35 * 32 - 5, spec), randn(rng, 33, 35 * 32 - 5)
    got = matmul(x, CpuWeight.from_packed(packed, isa), mode=mode)
    assert_close("slices", x.double() @ unpack(packed).double().T, got, BOUND[mode])


@every_isa
@every_kind
def test_few_rows_of_a_matrix_long_enough_for_four_streams(rng, isa, spec):
    n, k = 16 * 277 + 5, 1056  # two claims of 139 tiles, in fours and three
    packed, x, bias = random_packed(rng, n, k, spec), randn(rng, 5, k), randn(rng, n)
    weight = CpuWeight.from_packed(packed, isa)
    plain = matmul(x, weight, bias)
    assert_close("long", x.double() @ unpack(packed).double().T + bias, plain, BOUND["int8"])
    for m in range(1, 5):
        assert torch.equal(matmul(x[:m].contiguous(), weight, bias, threads=1), plain[:m])


@every_isa
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_activations(rng, isa, dtype):
    packed = random_packed(rng, 50, 96, Q4_1)
    weight, x, bias = CpuWeight.from_packed(packed, isa), randn(rng, 40, 96).to(dtype), None
    expected = x.double() @ unpack(packed).double().T
    wide = matmul(x, weight, bias, "exact", out=torch.empty(40, 50))
    assert_close("float32 out", expected, wide, 1e-5)
    got = matmul(x, weight, bias, "exact")
    assert torch.equal(got, wide.to(dtype)), "rounded once, ties to even"
    assert_close("int8", expected, matmul(x, weight), 1e-2)


@every_isa
@every_mode
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_weights(rng, isa, mode, dtype):
    for m, n, k in product((1, 5, 40), (1, 16, 37), (1, 31, 70)):
        weight, x = randn(rng, n, k).to(dtype), randn(rng, m, k)
        expected = x.double() @ weight.double().T
        size = x.double().abs() @ weight.double().abs().T
        error = (matmul(x, CpuWeight.from_tensor(weight, isa), mode=mode) - expected).abs()
        assert (error <= BOUND[mode] * size).all(), (m, n, k)


@every_isa
@every_kind
def test_results_do_not_depend_on_threads_rows_or_the_day(rng, isa, spec):
    packed = random_packed(rng, 333, 160, spec)
    weight, x = CpuWeight.from_packed(packed, isa), randn(rng, 70, 160)
    cpu = native.load("cpu")
    before = cpu.pool_threads()
    cpu.resize_pool(4)
    try:
        for mode in MODES:
            first = matmul(x, weight, mode=mode, threads=1)
            for threads in (1, 2, 3, 4):
                assert torch.equal(matmul(x, weight, mode=mode, threads=threads), first)
            if mode == "exact" or isa != "amx":  # amx rounds 32 rows or more more finely
                one_by_one = [matmul(row, weight, mode=mode) for row in x]
                assert torch.equal(torch.stack(one_by_one), first)
    finally:
        cpu.resize_pool(before)


@every_kind
def test_vector_instruction_sets_agree_to_the_bit(rng, spec):
    """But for AVX2, where bytes and codebooks meet x in 16 bits and come nearer to float64."""
    packed, x = random_packed(rng, 40, 192, spec), randn(rng, 24, 192)
    results = {isa: matmul(x, CpuWeight.from_packed(packed, isa)) for isa in ISAS}
    results.pop("generic", None)  # which has no fused multiply-add
    if spec.bits == 8 or spec.scheme == "codebook":
        finer = results.pop("avx2", None)
        if finer is not None and results:
            expected = x.double() @ unpack(packed).double().T
            error = rms_ratio(expected, finer)
            coarser = rms_ratio(expected, next(iter(results.values())))
            # A codebook's values are bytes for both.
            assert error <= coarser / (20 if spec.bits == 8 else 1.1), (error, coarser)
    same = list(results.values())
    assert all(torch.equal(result, same[0]) for result in same)


@every_isa
@every_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_only_the_output_is_written(rng, isa, mode, dtype):
    for m, n in product((1, 17, 40), (1, 16, 29)):
        weight = CpuWeight.from_packed(random_packed(rng, n, 65, Q4_1), isa)
        x = randn(rng, m, 65).to(dtype)
        around = torch.full((m + 2, n + 14), torch.nan, dtype=dtype)
        out = around[1:-1, 7:-7]
        assert matmul(x, weight, mode=mode, out=out) is out
        assert torch.equal(out, matmul(x, weight, mode=mode)) and not out.isnan().any()
        assert int(around.isnan().sum()) == around.numel() - out.numel()


@every_isa
@every_mode
def test_any_strides_and_alignment(rng, isa, mode):
    weight = CpuWeight.from_packed(random_packed(rng, 33, 40, Q4_1), isa)
    x = randn(rng, 36, 40)
    expected = matmul(x, weight, mode=mode)
    raw = bytearray(x.numel() * 4 + 1)
    misaligned = torch.frombuffer(raw, dtype=torch.float32, offset=1, count=x.numel()).view(36, 40)
    misaligned.copy_(x)
    assert misaligned.data_ptr() % 4
    padded = torch.full((36, 53), torch.nan)
    padded[:, 5:45] = x
    for name, same in {
        "transposed": x.T.contiguous().T,
        "padded": padded[:, 5:45],
        "strided": x.repeat_interleave(2, 1)[:, ::2],
        "misaligned": misaligned,
    }.items():
        assert torch.equal(matmul(same, weight, mode=mode), expected), name
    assert torch.equal(matmul(x[:1].expand(36, 40), weight, mode=mode)[35], expected[0])
    assert torch.equal(matmul(x.view(4, 9, 40), weight, mode=mode), expected.view(4, 9, 33))
    assert matmul(x[0], weight, mode=mode).shape == (33,)
    assert matmul(x[:0], weight, mode=mode).shape == (0, 33)
    assert matmul(x.new_empty(0, 3, 40), weight, mode=mode).shape == (0, 3, 33)


@every_isa
@every_mode
@pytest.mark.parametrize("m", [3, 40])
def test_non_finite_and_vanishing_activations(rng, isa, mode, m):
    packed = random_packed(rng, 20, 64, Q4_1)
    weight, x, bias = CpuWeight.from_packed(packed, isa), randn(rng, m, 64), randn(rng, 20)
    x[0, 5], x[1, 40], x[2] = torch.nan, torch.inf, 0
    y = matmul(x, weight, bias, mode)
    assert y[0].isnan().all() and not y[1].isfinite().any()
    assert torch.equal(y[2], bias)
    assert y[3:].isfinite().all()
    tiny = matmul(torch.full((m, 64), 1e-38), weight, mode=mode)
    assert tiny.isfinite().all() and (tiny.abs() < 1e-30).all()


@pytest.mark.parametrize("isa", isas())
def test_a_codebook_of_whole_numbers_is_multiplied_exactly(rng, isa):
    """IQ4_NL's values are integers up to 127: rounding x alone costs, of one-hot rows nothing."""
    packed = random_packed(rng, 40, 64, Spec(4, 32, "codebook", torch.float32))
    packed.codebook[:] = torch.tensor(IQ4_NL, dtype=torch.float32)
    weight, expected = CpuWeight.from_packed(packed, isa), unpack(packed).double().T
    few = [matmul(rows, weight) for rows in torch.eye(64).split(16)]
    assert_close("one-hot rows", expected, torch.cat(few), 1e-6)
    bound = BFLOAT if isa == "amx" else 1e-6  # from 32 rows on it rounds the weights
    assert_close("many one-hot rows", expected, matmul(torch.eye(64), weight), bound)


def test_a_codebook_that_8_bits_hold_badly_is_multiplied_exactly(rng):
    packed = random_packed(rng, 64, 64, Spec(4, 32, "codebook", torch.float32))
    # Drawn once: 8 bits happen to hold one in 170 of them well.
    packed.codebook[:] = 0.1 + 0.1 * torch.rand(16, generator=torch.Generator().manual_seed(0))
    packed.codebook[3] = -1.5
    x = randn(rng, 8, 64)
    got = matmul(x, CpuWeight.from_packed(packed))
    assert_close("codebook", x.double() @ unpack(packed).double().T, got, 1e-5)


def test_python_threads_share_the_pool(rng):
    packed, x = random_packed(rng, 400, 256, Q4_1), randn(rng, 33, 256)
    weight = CpuWeight.from_packed(packed)
    expected, wrong = matmul(x, weight), []

    def work():
        for _ in range(30):
            if not torch.equal(matmul(x, weight, threads=2), expected):
                wrong.append(threading.get_ident())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_has_a_pool_of_its_own(rng):
    packed, x = random_packed(rng, 400, 256, Q4_1), randn(rng, 5, 256)
    weight = CpuWeight.from_packed(packed)
    expected = matmul(x, weight, threads=2)
    child = os.fork()
    if child == 0:
        os._exit(not torch.equal(matmul(x, weight, threads=2), expected))
    assert os.waitpid(child, 0)[1] == 0


def test_the_layout_costs_no_more_than_its_padding(rng):
    packed = random_packed(rng, 512, 1024, Q4_1)
    assert CpuWeight.from_packed(packed).nbytes == packed.nbytes


def test_bytes_outlive_the_weight_that_borrowed_them(rng):
    data = CpuWeight.from_tensor(torch.randn(64, 64, generator=rng)).to_bytes().clone()
    kept, borrowed = weakref.ref(data), CpuWeight.from_bytes(data).to_bytes()
    del data
    gc.collect()
    assert kept() is not None and torch.equal(borrowed, kept())
    del borrowed
    gc.collect()
    assert kept() is None


def test_tiles_are_a_copy_of_the_permutation_too(rng):
    packed = random_packed(rng, 16, 32, Q4_1)
    perm = torch.randperm(32, generator=rng).int()
    packed, x = replace(packed, perm=perm), torch.randn(2, 32, generator=rng)
    tiled = Tiled.from_packed(packed)
    expected = matmul(x, CpuWeight.from_tiled(tiled))
    perm.fill_(1 << 30)
    assert torch.equal(matmul(x, CpuWeight.from_tiled(tiled)), expected)


@pytest.mark.parametrize("column", [-1, 32, 1 << 30])
def test_a_column_that_is_none_of_the_matrix_is_refused(rng, column):
    cpu, packed = native.load("cpu"), random_packed(rng, 16, 32, Q4_1)
    perm = torch.arange(32).int()
    fields = packed.native_fields() | {"perm": native.span(perm)}
    kind = {"n": 16, "k": 32, "bits": 4, "group": 32, "scheme": "minimum"}
    tiles = Tiled.from_packed(packed).stored["tiles"]
    given = kind | {"scale_dtype": "float16", "tiles": native.span(tiles)}
    cpu.Packed(**fields)
    cpu.TiledMatrix(**given, perm=native.span(perm))
    perm[5] = column
    for make in (lambda: cpu.Packed(**fields),
                 lambda: cpu.TiledMatrix(**given, perm=native.span(perm))):  # fmt: skip
        with pytest.raises(ValueError, match="perm has a column that is none of the matrix's"):
            make()


@pytest.mark.parametrize("scheme", ["codebook", "kquant", "stepped"])
def test_no_matrix_of_bytes_has_a_scheme_of_nibbles(scheme):
    group = {"kquant": 32, "stepped": 16}.get(scheme, 64)
    kind = {"k": 64, "bits": 8, "group": group, "scheme": scheme, "scale_dtype": "float32"}
    with pytest.raises(ValueError, match=f"no matrix of 8 bits is {scheme}"):
        native.load("cpu").tile_bytes(**kind)


def test_sizes_of_a_header_whose_product_is_more_than_64_bits(rng):
    """Rows and columns that 1 GiB could have each, and whose tiles wrap around to it together."""
    small = CpuWeight.from_tensor(torch.randn(16, 32, generator=rng)).to_bytes().clone()
    head, at = small.numel() - 2048, small[:256].view(torch.int64).tolist()
    tiles, blocks = 2**28 + 8 * 2032 + 1, 2**25 - 2032
    size = tiles * blocks * 2048 - 2**64 + head
    room = torch.zeros(size + 64, dtype=torch.uint8)
    data = room[-room.data_ptr() % 64 :][:size]
    data[:head] = small[:head]
    words = data[:256].view(torch.int64)
    n, k = at.index(16), at.index(32)
    assert n + 1 == k and at[k + 1 : k + 3] == [1, 1]  # n, k, tiles, blocks
    words[n], words[k] = tiles * 16, blocks * 32
    with pytest.raises(ValueError, match="these bytes are no tiles of a matrix"):
        CpuWeight.from_bytes(data)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_torchs_default_dtype_is_none_of_ours(rng, dtype):
    packed, y = random_packed(rng, 40, 32, Q4_1), torch.randn(3, 40, generator=rng)
    expected = matmul_transposed(y, CpuWeight.from_packed(packed))
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(matmul_transposed(y, CpuWeight.from_packed(packed)), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_what_is_wrong_is_named(rng):
    packed = random_packed(rng, 8, 32, Q4_1)
    weight, x = CpuWeight.from_packed(packed), torch.zeros(2, 32)
    for error, match, call in (
        (ValueError, r"x must be .*32.*, found \(2, 31\)", lambda: matmul(x[:, 1:], weight)),
        (TypeError, "found torch.float64", lambda: matmul(x.double(), weight)),
        (TypeError, "found torch.float32 on meta", lambda: matmul(x.to("meta"), weight)),
        (ValueError, "mode must be", lambda: matmul(x, weight, mode="fast")),
        (ValueError, "threads must be at least 1", lambda: matmul(x, weight, threads=0)),
        (ValueError, r"bias must be \(8,\)", lambda: matmul(x, weight, x[0, :7])),
        (ValueError, r"out must be \(2, 8\)", lambda: matmul(x, weight, out=torch.empty(2, 9))),
        (TypeError, "out must be", lambda: matmul(x, weight, out=torch.empty(2, 8).half())),
        (ValueError, "contiguous rows",
         lambda: matmul(x, weight, out=torch.empty(12).as_strided((2, 8), (4, 1)))),
        (ValueError, r"rows must be a part of 0..8, found -1..1",
         lambda: weight.rows(-1, torch.empty(2, 32))),
        (ValueError, r"out must be contiguous \(R, 32\) float32",
         lambda: weight.rows(0, torch.empty(2, 64)[:, :32])),
        (ValueError, "isa must be one of", lambda: CpuWeight.from_packed(packed, "avx3")),
        (ValueError, "not empty", lambda: CpuWeight.from_tensor(x[:0].half())),
        (TypeError, "weight must be one of", lambda: CpuWeight.from_tensor(x.double())),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            call()
    assert isas() == ISAS and ISAS[-1] == "generic" and weight.isa == ISAS[0]
    assert rms_ratio(x[:, :8] + 1, matmul(x, weight) + 1) == 0
