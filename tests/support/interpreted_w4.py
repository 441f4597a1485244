"""The Triton matmul against float64: interpreted, in a child process of test_w4_triton.py, and by
test_w4_triton_gpu.py where there is a GPU."""

import dataclasses
from itertools import product

import numpy as np
import pytest
import torch
from support.packed import every_spec
from support.w4_calls import BOUND, Matmul, check, make, random_case, scaled

from engine.kernels.w4 import fused, launch
from engine.kernels.w4.format import Spec
from engine.kernels.w4.fusion import Fusion
from engine.kernels.w4.launch import DENSE, Launch
from engine.kernels.w4.layout_gpu import GpuMatrix, to_gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GUARD = 64  # elements on either side of what a kernel writes
SIZES = {
    "gemv": Launch("gemv", BLOCK_M=16, WARPS=2, num_stages=3, CHUNKS=2),
    "gemm": Launch("gemm", BLOCK_M=16, WARPS=2, num_stages=3),
    "split": Launch("gemm", BLOCK_M=16, WARPS=2, num_stages=3, SPLITS=2),
    "dense": DENSE,
}
EDGES_M = {"gemv": (1, 2, 15, 16), "gemm": (1, 15, 16, 17), "split": (1, 17), "dense": (1, 3)}
EDGES_N = (1, 2, 15, 16, 17, 31, 32, 33, 34)
EDGES_K = (1, 16, 63, 64, 65, 80, 127, 128, 129, 511, 512, 513)


@pytest.fixture(autouse=True)
def outputs(monkeypatch) -> None:
    """What kernels write to holds NaN before, and so do its surroundings, after too."""
    made = []

    def empty(*shape: int, dtype: torch.dtype, device) -> torch.Tensor:
        size = int(np.prod(shape))
        made.append(torch.full((size + 2 * GUARD,), torch.nan, dtype=dtype, device=device))
        return made[-1][GUARD : GUARD + size].view(shape)

    monkeypatch.setattr(torch, "empty", empty)
    yield
    for tensor in made:
        assert tensor[:GUARD].isnan().all() and tensor[-GUARD:].isnan().all()


def operands(case: Matmul) -> tuple[torch.Tensor, GpuMatrix, torch.Tensor | None]:
    """x, strided and misaligned as the case says, weights and bias on the device."""
    m, k = case.x.shape
    width = case.x.stride(0) if m > 1 else k
    storage = torch.zeros(case.offset + m * width, dtype=case.x.dtype, device=DEVICE)
    x = storage[case.offset :].view(m, width)[:, :k].copy_(case.x)
    return x, to_gpu(case.packed.to(DEVICE)), None if case.bias is None else case.bias.to(DEVICE)


def run(case: Matmul, sizes: Launch | None) -> torch.Tensor:
    x, weight, bias = operands(case)
    return fused.matmul(x, weight, bias, case.gated, case.out_dtype, sizes).cpu()


def turns(rng, count: int) -> list[str]:
    """Kernels, each as often as the others, in random order."""
    order = torch.randperm(count, generator=rng) % len(SIZES)
    return [list(SIZES)[i] for i in order]


@pytest.mark.parametrize("dtype", BOUND)
def test_every_spec(rng, dtype):
    specs = every_spec()
    for spec, kernel in zip(specs, turns(rng, len(specs)), strict=True):
        case = make(rng, spec, dtype, 16, 18, 300)
        check(case, run(case, SIZES[kernel]), exact=False)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", SIZES)
@pytest.mark.parametrize("dtype", BOUND)
def test_every_spec_on_every_kernel(rng, dtype, kernel):
    for spec, permuted, gated in product(every_spec(), (False, True), (False, True)):
        case = make(rng, spec, dtype, 8, 68, 300, permuted=permuted, gated=gated, bias=gated)
        check(case, run(case, SIZES[kernel]), exact=False)


def edges(rng, kernel: str, count: int | None) -> list[Matmul]:
    shapes = list(product(EDGES_M[kernel], EDGES_N, EDGES_K))
    chosen = torch.randperm(len(shapes), generator=rng)[:count]
    return [without_norm(random_case(rng, *shapes[i])) for i in chosen]


def without_norm(case: Matmul) -> Matmul:
    fusion = Fusion(gated=case.gated, activation=case.fusion.activation)
    return dataclasses.replace(case, fusion=fusion)


@pytest.mark.parametrize("kernel", SIZES)
def test_edges_with_random_options(rng, kernel):
    for case in edges(rng, kernel, 12):
        check(case, run(case, SIZES[kernel]), exact=False)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", SIZES)
def test_all_edges_with_random_options(rng, kernel):
    for case in edges(rng, kernel, None):
        check(case, run(case, SIZES[kernel]), exact=False)


@pytest.mark.parametrize("m", (1, 9, 33))
def test_table(rng, monkeypatch, m):
    monkeypatch.setattr(launch, "DENSE_ROWS", 33)
    case = make(rng, Spec(4, 64, "minimum"), torch.float16, m, 34, 1200, gated=True, bias=True)
    check(case, run(case, None), exact=False)


def test_dense_in_parts(rng, monkeypatch):
    monkeypatch.setattr(launch, "DENSE_WEIGHTS", 20 * 300)
    case = make(rng, Spec(4, 32, "kquant"), torch.float16, 8, 50, 300, gated=True, bias=True)
    check(case, run(case, DENSE), exact=False)


def test_any_stride_of_a_bias(rng):
    for m in (3, 40):
        case = make(rng, Spec(4, 32, "zero"), torch.float16, m, 34, 130, bias=True)
        x, weight, bias = operands(case)
        assert bias is not None
        wide = bias.new_full((2 * len(bias),), torch.nan)
        wide[::2] = bias
        check(case, fused.matmul(x, weight, wide[::2]).cpu(), exact=False)


def test_any_shape_of_x(rng):
    case = make(rng, Spec(4, 32, "zero"), torch.float16, 12, 34, 130)
    x, weight, _ = operands(case)
    for given in (x.view(2, 2, 3, 130), x.T.contiguous().T):
        y = fused.matmul(given, weight)
        assert y.shape == (*given.shape[:-1], 34)
        check(case, y.view(12, 34).cpu(), exact=False)
    assert fused.matmul(x[:0], weight).shape == (0, 34)
    assert fused.matmul(x[0], weight).shape == (34,)


@pytest.mark.parametrize("kernel", [kernel for kernel in SIZES if kernel != "dense"])
def test_small_scales(rng, kernel):
    """Below what float16 represents with its full precision; "dense" multiplies float16 weights."""
    case = make(rng, Spec(8, 32, "symmetric", torch.float32), torch.float16, 8, 34, 300)
    case = dataclasses.replace(case, x=case.x * 64, packed=scaled(case.packed, 2e-4))
    check(case, run(case, SIZES[kernel]), exact=False)


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter's accesses are watched")
@pytest.mark.parametrize("kernel", SIZES)
def test_touches_its_tensors_alone(rng, inside, kernel):
    for case in edges(rng, kernel, 12):
        run(case, SIZES[kernel])


def test_errors(rng):
    case = make(rng, Spec(4, 32, "symmetric"), torch.float16, 2, 17, 64)
    x, weight, _ = operands(case)
    bias = torch.zeros(17, dtype=torch.float32, device=DEVICE)
    for match, error, arguments in (
        ("x must be float16 or bfloat16, found torch.float32", TypeError, (x.float(), weight)),
        (r"x must be \(..., 64\), found \(2, 63\)", ValueError, (x[:, :63], weight)),
        ("even number of rows, found 17", ValueError, (x, weight, None, True)),
        (r"bias must be \(17,\) torch.float16, found \(17,\) torch.float32", ValueError,
         (x, weight, bias)),
        ("out_dtype must be torch.float16 or torch.float32, found torch.bfloat16", TypeError,
         (x, weight, None, False, torch.bfloat16)),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            fused.matmul(*arguments)
