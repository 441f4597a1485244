"""The packed group format: its meaning code by code, in Python and C++ on the same bytes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.close import assert_close
from support.packed import every_spec, random_packed, spec_id

from engine.kernels import native
from engine.kernels.w4.format import (
    GROUPS,
    Packed,
    Spec,
    check_finite,
    concatenate,
    pack_codes,
    rows_of,
    unpack,
    unpack_codes,
    validate,
)
from engine.kernels.w4.reference import matmul

SHAPES = [(1, 1), (3, 37), (2, 129), (5, 288)]


def one_value(packed: Packed, row: int, column: int) -> np.float32:
    """The formula of README.md for one stored column, in scalar float32."""
    spec, f32 = packed.spec, np.float32
    byte = int(packed.codes[row, column // 2 if spec.bits == 4 else column])
    q = byte if spec.bits == 8 else (byte >> 4 if column % 2 else byte & 15)
    g = column // (spec.group or packed.shape[1])
    scale = f32(float(packed.scales[row, g]))
    if spec.scheme == "symmetric":
        return f32(q - {4: 8, 8: 128}[spec.bits]) * scale
    if spec.scheme == "zero":
        return f32(q - int(packed.zeros[row, g])) * scale
    if spec.scheme == "minimum":
        return f32(q) * scale + f32(float(packed.mins[row, g]))
    if spec.scheme == "codebook":
        return f32(float(packed.codebook[q])) * scale
    d, dmin = (f32(float(value)) for value in packed.supers[row, column // 256])
    return d * scale * f32(q) - dmin * f32(int(packed.mins[row, g]))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("permuted", [False, True], ids=["", "permuted"])
@pytest.mark.parametrize("spec", every_spec(), ids=spec_id)
def test_unpack_is_the_formula(spec, permuted, rng):
    n, k = 3, 283
    packed = random_packed(rng, n, k, spec, permuted)
    expected = torch.empty(n, k)
    for row in range(n):
        for column in range(k):
            place = int(packed.perm[column]) if permuted else column
            expected[row, place] = float(one_value(packed, row, column))
    assert same_bits(unpack(packed), expected)
    if spec.bits == 4 or n * k >= 256:
        assert len(unpack_codes(packed).unique()) == 1 << spec.bits, "not every code appears"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("permuted", [False, True], ids=["", "permuted"])
@pytest.mark.parametrize("spec", every_spec(), ids=spec_id)
def test_cpp_unpacks_the_same_bits(spec, permuted, shape, rng):
    cpu = native.load("cpu")
    packed = random_packed(rng, *shape, spec, permuted)
    guard = 64
    out = torch.full((packed.shape[0] * packed.shape[1] + guard,), torch.nan)
    cpu.w4_unpack(cpu.Packed(**packed.native_fields()), native.span(out))
    assert same_bits(out[:-guard].view(shape), unpack(packed))
    assert out[-guard:].isnan().all(), "wrote past the end"


def test_cpp_reads_every_half_and_bfloat():
    """All 65536 bit patterns as scales of one-code rows, subnormals and infinities included."""
    cpu = native.load("cpu")
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        scales = patterns.view(dtype)[:, None]
        codes = pack_codes(torch.full((len(patterns), 1), 9, dtype=torch.uint8), 4)
        packed = Packed(Spec(4, 0, "symmetric", dtype), (len(patterns), 1), codes, scales)
        out = torch.empty(packed.shape)
        cpu.w4_unpack(cpu.Packed(**packed.native_fields()), native.span(out))
        expected, nan = scales.float(), scales.isnan()
        assert torch.equal(out.isnan(), nan)
        assert same_bits(out[~nan], expected[~nan])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("k", [1, 15, 16, 17, 31, 32, 33, 100])
def test_pack_codes_round_trip(bits, k, rng):
    codes = torch.randint(0, 1 << bits, (3, k), generator=rng, dtype=torch.uint8)
    packed_rows = pack_codes(codes, bits)
    spec = Spec(bits, 0, "symmetric")
    assert packed_rows.shape == (3, spec.row_bytes(k)) and packed_rows.shape[1] % 16 == 0
    packed = Packed(spec, (3, k), packed_rows, torch.ones(3, 1).half())
    assert torch.equal(unpack_codes(packed), codes)
    assert not packed_rows[:, -(-k * bits // 8) :].any(), "padding codes are zero"


@settings(max_examples=60, deadline=None)
@given(
    spec=st.sampled_from(every_spec()),
    n=st.integers(1, 5),
    k=st.integers(1, 300),
    permuted=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_reference_matmul_any_shape(spec, n, k, permuted, seed):
    rng = torch.Generator().manual_seed(seed)
    packed = random_packed(rng, n, k, spec, permuted)
    x = torch.randn(2, 1, k, generator=rng)
    bias = torch.randn(n, generator=rng)
    stored = unpack(replace(packed, perm=None)).double()
    perm = packed.perm.long() if permuted else torch.arange(k)
    y = matmul(x.double(), packed, bias.double())
    assert y.shape == (2, 1, n) and y.dtype == torch.float64
    assert_close("perm on x", x.double()[..., perm] @ stored.T + bias.double(), y, 1e-12)
    scale = x.double().abs() @ unpack(packed).double().abs().T + bias.abs()
    error = (matmul(x, packed, bias).double() - y).abs()
    assert (error <= 1e-5 * scale).all()


def test_reference_matmul_of_nothing(rng):
    packed = random_packed(rng, 3, 5, Spec(4, 16, "symmetric"))
    assert matmul(torch.empty(0, 5), packed).shape == (0, 3)
    assert matmul(torch.ones(5).half(), packed).dtype == torch.float16


@pytest.mark.parametrize(
    "x, bias, error, words",
    [
        (torch.ones(2, 4), None, ValueError, r"\(\.\.\., 5\), found \(2, 4\)"),
        (torch.ones(()), None, ValueError, r"found \(\)"),
        (torch.ones(2, 5).int(), None, TypeError, "floating point, found torch.int32"),
        (torch.ones(2, 5), torch.ones(4), ValueError, r"bias must be \(3,\), found \(4,\)"),
    ],
)
def test_reference_matmul_names_bad_input(x, bias, error, words, rng):
    packed = random_packed(rng, 3, 5, Spec(4, 16, "symmetric"))
    with pytest.raises(error, match=words):
        matmul(x, packed, bias)


@pytest.mark.parametrize("spec", every_spec(), ids=spec_id)
def test_spec_survives_json(spec):
    assert Spec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize(
    "change, words",
    [
        ({"version": 2}, "version 2, this version reads 1"),
        ({"version": None}, "version None"),
        ({"bits": 3}, "bits must be 4 or 8, found 3"),
        ({"bits": "4"}, "bits must be 4 or 8, found '4'"),
        ({"group": 48}, "group must be one of .*, found 48"),
        ({"group": -1}, "found -1"),
        ({"group": [16]}, r"found \[16\]"),
        ({"scheme": "magic"}, "found 'magic'"),
        ({"scale_dtype": "float64"}, "found 'float64'"),
        ({"scale_dtype": ["float16"]}, "scale_dtype"),
        ({"extra": 1}, "found .*'extra'"),
        ({"bits": 8, "scheme": "codebook"}, "'codebook' has 4 bits, found 8"),
        ({"group": 64, "scheme": "kquant"}, "'kquant' has 4 bits, group 32"),
    ],
)
def test_spec_names_bad_json(change, words):
    with pytest.raises(ValueError, match=words):
        Spec.from_json(Spec(4, 32, "symmetric").to_json() | change)


@pytest.mark.parametrize(
    "scheme, change, error, words",
    [
        ("zero", lambda p: {"shape": (0, 40)}, ValueError, r"positive, found \(0, 40\)"),
        ("zero", lambda p: {"shape": (3, 70)}, ValueError, r"codes must be \(3, 48\)"),
        ("zero", lambda p: {"zeros": None}, ValueError, "stores .*'zeros'.*, found"),
        ("zero", lambda p: {"mins": p.scales}, ValueError, "found .*'mins'"),
        ("zero", lambda p: {"scales": p.scales.float()}, TypeError, "must be torch.float16"),
        ("zero", lambda p: {"scales": p.scales[:, :1]}, ValueError, r"must be \(3, 3\)"),
        ("zero", lambda p: {"scales": p.scales.T.contiguous().T}, ValueError, "contiguous"),
        ("zero", lambda p: {"zeros": p.zeros.to("meta")}, ValueError, "meta, codes are on cpu"),
        ("zero", lambda p: {"perm": torch.zeros(40).int()}, ValueError, "each of 0..39 once"),
        ("zero", lambda p: {"perm": torch.arange(40)}, TypeError, "perm must be torch.int32"),
        ("codebook", lambda p: {"codebook": p.codebook[:8]}, ValueError, r"must be \(16,\)"),
    ],
)
def test_validate_names_what_disagrees(scheme, change, error, words, rng):
    packed = random_packed(rng, 3, 40, Spec(4, 16, scheme))
    with pytest.raises(error, match="^model.q_proj: .*" + words):
        validate(replace(packed, **change(packed)), "model.q_proj")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "spec, part",
    [
        (Spec(4, 16, "minimum"), "scales"),
        (Spec(4, 16, "minimum"), "mins"),
        (Spec(4, 32, "kquant"), "supers"),
        (Spec(4, 16, "codebook"), "codebook"),
    ],
)
def test_check_finite_names_the_part(spec, part, bad, rng):
    packed = check_finite(random_packed(rng, 3, 40, spec))
    getattr(packed, part).view(-1)[-1] = bad
    with pytest.raises(ValueError, match=f"^head: {part} must be finite"):
        check_finite(packed, "head")


def test_pack_codes_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="below 16, found 16"):
        pack_codes(torch.tensor([[16]], dtype=torch.uint8), 4)
    with pytest.raises(TypeError, match=r"\(N, K\) uint8, found \(2,\)"):
        pack_codes(torch.zeros(2, dtype=torch.uint8), 4)
    with pytest.raises(TypeError, match=r"found .* torch\.int32"):
        pack_codes(torch.zeros(2, 2).int(), 4)


@pytest.mark.parametrize("scheme", ["symmetric", "codebook"])
def test_concatenate_stacks_rows(scheme, rng):
    spec = Spec(4, 64, scheme)
    first = random_packed(rng, 3, 100, spec, permuted=True)
    second = replace(random_packed(rng, 2, 100, spec), perm=first.perm.clone())
    fused = validate(concatenate([first, second]))
    assert torch.equal(unpack(fused), torch.cat([unpack(first), unpack(second)]))
    assert torch.equal(unpack(validate(rows_of(fused, 3, 5))), unpack(second))
    assert rows_of(fused, 0, 3).codes.data_ptr() == fused.codes.data_ptr()
    with pytest.raises(ValueError, match=r"part of 0\.\.5, found 3\.\.6"):
        rows_of(fused, 3, 6)
    with pytest.raises(ValueError, match="one perm, found two"):
        concatenate([first, replace(second, perm=None)])
    with pytest.raises(ValueError, match="one spec and K"):
        concatenate([first, random_packed(rng, 2, 100, Spec(4, 32, scheme))])
    with pytest.raises(ValueError, match="one spec and K"):  # rows of as many bytes
        concatenate([first, random_packed(rng, 2, 99, spec, permuted=True)])
    if scheme == "codebook":
        with pytest.raises(ValueError, match="one codebook, found two"):
            concatenate([first, replace(second, codebook=first.codebook + 1)])


@pytest.mark.parametrize(
    "spec, bits",
    [
        (Spec(4, 32, "symmetric"), 4.5),
        (Spec(4, 32, "minimum"), 5.0),
        (Spec(4, 128, "symmetric"), 4.125),
        (Spec(4, 128, "zero"), 4.1875),
        (Spec(4, 32, "kquant"), 4.625),
        (Spec(8, 32, "symmetric"), 8.5),
    ],
    ids=str,
)
def test_bits_per_weight(spec, bits, rng):
    packed = random_packed(rng, 4, 512, spec)
    assert packed.bits_per_weight == bits == packed.nbytes * 8 / (4 * 512)
    assert set(GROUPS) >= {packed.spec.group}
