"""The CUDA kernels against float64, run on a CPU under AddressSanitizer and UBSan."""

import dataclasses
from itertools import product

import pytest
import torch
from support.emulated import build, error_of, run
from support.packed import every_spec
from support.w4_calls import BOUND, EDGES_K, EDGES_N, Matmul, check, make, random_case, scaled

from engine.kernels.w4.cuda import Norm, describe
from engine.kernels.w4.format import Spec
from engine.kernels.w4.layout_gpu import to_gpu

G128 = Spec(4, 128, "symmetric")


@pytest.fixture(scope="session")
def kernels():
    return build("w4", "csrc/cuda/w4_matmul.cu", "tests/support/emulated.cpp")


def check_all(kernels, cases: list[Matmul], folder) -> None:
    for case, y in zip(cases, run(kernels, cases, folder), strict=True):
        check(case, y)


@pytest.mark.parametrize("dtype", BOUND)
def test_every_spec(kernels, rng, tmp_path, dtype):
    wide = {"out_dtype": torch.float32}
    cases = [make(rng, spec, dtype, 8, 33, 300, **wide) for spec in every_spec()]
    check_all(kernels, cases, tmp_path)


def test_edges_with_random_options(kernels, rng, tmp_path):
    shapes = product((1, 2, 8), EDGES_N, EDGES_K)
    check_all(kernels, [random_case(rng, *shape) for shape in shapes], tmp_path)


@pytest.mark.slow
def test_sweep(kernels, rng, tmp_path):
    shapes = list(product(range(1, 9), (*EDGES_N, 50), (*EDGES_K, 300, 576, 1021)))
    for _ in range(3):
        check_all(kernels, [random_case(rng, *shape) for shape in shapes], tmp_path)


@pytest.mark.parametrize("bits", (4, 8))
def test_more_chunks_than_fly_and_more_x_than_fits(kernels, rng, tmp_path, bits):
    """K beyond 8 warps x 4 chunks, and at M = 8 beyond the slice of x in shared memory."""
    chunk = 512 // bits
    cases = [
        make(rng, Spec(bits, 32, "minimum"), dtype, m, 3, k, bias=True, norm=norm)
        for dtype in BOUND
        for m, k in ((1, 33 * chunk + 4), (8, 65 * chunk + 1))
        for norm in (None, 1.0)
    ]
    check_all(kernels, cases, tmp_path)


def test_hard_values(kernels, rng, tmp_path):
    """Scales below float16's, and x whose squares are beyond: sums are float32 throughout."""
    spec = Spec(4, 32, "symmetric", torch.float32)
    case = make(rng, spec, torch.float16, 8, 33, 128, out_dtype=torch.float32)
    tiny = dataclasses.replace(case, name="tiny scales", packed=scaled(case.packed, 1e-8))
    norm = Norm(torch.full((128,), 1e-3, dtype=torch.float16), eps=1e-6)
    large = dataclasses.replace(case, name="large x", x=case.x * 1e4, norm=norm)
    check_all(kernels, [tiny, large], tmp_path)


def test_no_rows(kernels, rng, tmp_path):
    check_all(kernels, [make(rng, G128, torch.float16, 0, 17, 128)], tmp_path)


def test_native_errors(kernels, rng, tmp_path):
    case = make(rng, G128, torch.float16, 2, 16, 128)

    def error(**fields) -> str:
        call = case.call()
        for name, value in fields.items():
            setattr(call.weights if hasattr(call.weights, name) else call, name, value)
        return error_of(kernels, case, call, tmp_path)

    assert error() == ""
    assert error(m=9) == "w4_matmul: x must have 0 to 8 rows, found 9"
    assert "empty" in error(k=0)
    assert "bits must be 4, or 8 without a codebook or super-scales, found 5" in error(bits=5)
    assert "bits must be 4, or 8" in error(bits=8, scheme=3)
    assert error(group=48).endswith("group must be 0, 16, 32, 64 or 128, found 48")
    assert "x must be float16 or bfloat16" in error(x_type=2)
    assert "y must have the type of x or float32" in error(y_type=1)
    assert "even number of rows" in error(gated=1, n=15)


def test_python_errors(rng):
    case = make(rng, G128, torch.float16, 2, 16, 128)
    x, y, weights = case.x, case.output(), to_gpu(case.packed)

    def raises(kind, message: str, **arguments) -> None:
        with pytest.raises(kind, match=message):
            describe(**({"x": x, "weights": weights, "y": y} | arguments))

    raises(TypeError, "x must be float16 or bfloat16, found torch.float32", x=x.float())
    raises(ValueError, r"x must be \(M, 128\) with M <= 8, found \(2, 64\)", x=x[:, :64])
    raises(ValueError, r"found \(9, 128\)", x=torch.zeros(9, 128).half())
    raises(ValueError, "rows of x must be contiguous", x=torch.zeros(128, 2).half().T)
    raises(TypeError, "y must be torch.float16 or torch.float32", y=y.bfloat16())
    raises(ValueError, r"y must be a contiguous \(2, 16\)", y=y[:, :8])
    raises(ValueError, r"bias must be a contiguous \(16,\) torch.float16", bias=torch.zeros(16))
    raises(ValueError, "norm must be a contiguous", norm=Norm(torch.zeros(64).half(), 1e-5))
    raises(ValueError, "y is on meta, x is on cpu", y=y.to("meta"))
