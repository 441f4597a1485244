"""The 4-bit ops of torch.library: opcheck, gradients, layouts, errors; Triton interpreted."""

import warnings

import pytest
import torch
from support.interpreted import run_interpreted
from support.ops_checks import SPECS, case, check_gradients, check_ops, check_scale_gradients
from support.packed import every_spec, random_packed, spec_id

from engine.kernels import dispatch
from engine.kernels.dispatch import BackendUnavailable
from engine.kernels.dtypes import DTYPES, dtype_of
from engine.kernels.w4 import cpu
from engine.kernels.w4.format import Spec, unpack, zeros
from engine.kernels.w4.layout_gpu import from_gpu, to_gpu
from engine.kernels.w4.ops import (
    Prepared,
    matmul,
    prepare,
    restore,
    w4_matmul,
    w4_matmul_transposed,
)

every_spec_kind = pytest.mark.parametrize("spec", SPECS, ids=spec_id)
every_dtype = pytest.mark.parametrize("dtype", [*map(dtype_of, DTYPES)], ids=str)
Q4_1 = Spec(4, 32, "minimum")
WITH_SCALES = [spec for spec in SPECS if spec.scheme != "kquant"]  # those of kquant are integers


@every_dtype
@every_spec_kind
def test_opcheck(rng, spec, dtype):
    check_ops(rng, prepare(case(rng, spec), "cpu"), dtype, "cpu")


@pytest.mark.parametrize("backend", ["dense", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_opcheck_of_the_reference(rng, dtype, backend):
    check_ops(rng, prepare(case(rng, Spec(4, 16, "zero")), backend), dtype, "cpu")


@pytest.mark.parametrize("backend", ["cpu", "dense", "reference"])
@every_dtype
@every_spec_kind
def test_gradients(rng, spec, dtype, backend):
    check_gradients(rng, case(rng, spec), backend, dtype)


@pytest.mark.parametrize("backend", ["dense", "reference"])
@every_dtype
@pytest.mark.parametrize("spec", WITH_SCALES, ids=spec_id)
def test_scale_gradients(rng, spec, dtype, backend):
    check_scale_gradients(rng, case(rng, spec), backend, dtype)


def test_gradient_in_parts(rng, monkeypatch):
    monkeypatch.setattr(cpu, "BLOCK_WEIGHTS", 5 * 201)
    check_gradients(rng, case(rng, Q4_1), "cpu", torch.float32)


@every_spec_kind
def test_gradcheck(rng, spec):
    """First and second derivatives, in float64 on the reference."""
    matrix = prepare(case(rng, spec, 5, 37), "reference")
    x = torch.randn(3, 37, generator=rng, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, generator=rng, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, bias: matmul(x, matrix, bias), (x, bias))
    assert torch.autograd.gradgradcheck(lambda x, bias: matmul(x, matrix, bias), (x, bias))


def test_second_derivatives_of_the_kernels(rng):
    """The product is linear: the gradient of its gradient is the product again."""
    packed = case(rng, Q4_1)
    x = torch.randn(4, 201, generator=rng, requires_grad=True)
    dy = torch.randn(4, 34, generator=rng, requires_grad=True)
    (dx,) = torch.autograd.grad(matmul(x, prepare(packed)), x, dy, create_graph=True)
    direction = torch.randn(4, 201, generator=rng)
    (again,) = torch.autograd.grad(dx, dy, direction)
    torch.testing.assert_close(again, direction @ unpack(packed).T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("spec", every_spec(), ids=spec_id)
def test_layouts_are_undone(rng, spec, permuted):
    for n, k in ((1, 1), (16, 32), (37, 201), (33, 256)):
        packed = random_packed(rng, n, k, spec, permuted)
        on_cpu = restore(prepare(packed, "cpu"))
        for back in (on_cpu, from_gpu(to_gpu(packed)), restore(prepare(packed, "reference"))):
            assert back.spec == spec and back.shape == (n, k)
            assert back.tensors().keys() == packed.tensors().keys()
            for name, tensor in packed.tensors().items():
                assert torch.equal(back.tensors()[name].view(torch.uint8), tensor.view(torch.uint8))


def test_tiles_are_what_their_bytes_say(rng):
    packed, x = case(rng, Spec(4, 0, "codebook")), torch.randn(3, 201, generator=rng)
    matrix = prepare(packed, "cpu")
    expected, tiles = matmul(x, matrix), matrix.tensors["tiles"]
    copied = Prepared(matrix.spec, matrix.shape, "cpu", {"tiles": tiles.clone()})
    del matrix, tiles
    assert torch.equal(matmul(x, copied), expected)
    rows = cpu.CpuWeight.from_packed(packed).rows(3, torch.full((17, 201), torch.nan))
    assert torch.equal(rows, unpack(packed)[3:20])


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_whole(rng, dynamic):
    matrix = prepare(case(rng, Q4_1))

    def function(x):
        return matmul(x.relu(), matrix).tanh().sum(-1)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (1, 5, 8):
        x = torch.randn(rows, 201, generator=rng, requires_grad=True)
        results = [f(x) for f in (compiled, function)]
        grads = [torch.autograd.grad(y.sum(), x)[0] for y in results]
        assert torch.equal(*results) and torch.equal(*grads)


def test_every_device_has_its_implementation():
    for op in ("shallow::w4_matmul", "shallow::w4_matmul_transposed"):
        for key in ("CPU", "CUDA", "Meta", "Autograd"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(op, key), (op, key)


HALF = "opcheck and torch.float16"  # of the time; two workers share the whole


@pytest.mark.parametrize("names", [HALF, f"not ({HALF})"])
def test_triton_interpreted(names):
    run_interpreted("ops", names=names)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU backends can run here")
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_backend_that_cannot_run_says_why(rng, backend):
    with pytest.raises(BackendUnavailable, match=f"backend {backend}: "):
        prepare(case(rng, Q4_1), backend)
    packed = case(rng, Q4_1)
    matrix = Prepared(Q4_1, packed.shape, backend, to_gpu(packed).tensors())
    with pytest.raises((BackendUnavailable, ValueError), match="GPU"):
        matmul(torch.zeros(2, 201).half(), matrix)


def test_without_the_extension_the_reference_runs(rng, monkeypatch):
    monkeypatch.setattr(dispatch.native, "error", lambda name: "not built")
    packed = case(rng, Q4_1)
    matrix = prepare(packed)
    assert matrix.backend == "reference"
    x = torch.randn(3, 201, generator=rng)
    torch.testing.assert_close(matmul(x, matrix), x @ unpack(packed).T)
    with pytest.raises(BackendUnavailable, match="backend cpu: not built"):
        prepare(packed, "cpu")


def test_what_is_wrong_is_named(rng):
    packed = random_packed(rng, 8, 32, Q4_1)
    matrix, x = prepare(packed, "cpu"), torch.zeros(2, 32)
    arguments, tiles = matrix.arguments()[1:], matrix.tensors["tiles"]
    parts = list(to_gpu(packed).tensors().values())
    wide = [parts[0], *(part.float() for part in parts[1:])]
    odd = torch.zeros(len(tiles) + 1, dtype=torch.uint8)[1:].copy_(tiles)
    for error, match, call in (
        (ValueError, r"x must be \(..., 32\), found \(2, 31\)", lambda: matmul(x[:, 1:], matrix)),
        (TypeError, "x must be .*, found torch.float64 on cpu", lambda: matmul(x.double(), matrix)),
        (TypeError, "x must be .*, found torch.int64", lambda: matmul(x.long(), matrix)),
        (ValueError, r"bias must be \(8,\)", lambda: matmul(x, matrix, x[0, :7])),
        (ValueError, r"y must be \(..., 8\), found \(2, 32\)",
         lambda: w4_matmul_transposed(x, *matrix.arguments())),
        (TypeError, "y must be .*, found torch.float64",
         lambda: w4_matmul_transposed(x[:, :8].double(), *matrix.arguments())),
        (ValueError, r"weight must be \(9, 32\), found \(8, 32\)",
         lambda: w4_matmul(x, [tiles], 9, *arguments[1:], None, False)),
        (ValueError, "no tiles", lambda: w4_matmul(x, [tiles * 0], *arguments, None, False)),
        (ValueError, "tiles must have .* bytes",
         lambda: w4_matmul(x, [tiles[:-64]], *arguments, None, False)),
        (ValueError, "multiple of 64", lambda: w4_matmul(x, [odd], *arguments, None, False)),
        (TypeError, "tiles must be one contiguous row of uint8",
         lambda: w4_matmul(x, [packed.codes], *arguments, None, False)),
        (ValueError, "tiles of another shape or spec",
         lambda: restore(Prepared(Spec(4, 64, "minimum"), (8, 32), "cpu", matrix.tensors))),
        (ValueError, "weight must be .*'codes', 'scales', 'mins', 'perm'.*, found 2",
         lambda: w4_matmul(x, parts[:2], *arguments[:-1], "reference", None, False)),
        (ValueError, r"scales must be a contiguous \(8, 1\) torch.float16, found \(8, 1\) torch.fl",
         lambda: w4_matmul(x, wide, *arguments[:-1], "gpu", None, False)),
        (TypeError, "x must be floats, found torch.int64",
         lambda: matmul(x.long(), prepare(packed, "dense"))),
        (ValueError, r"bias must be \(8,\) torch.float32 on cpu, found \(8,\) torch.float16",
         lambda: matmul(x, prepare(packed, "dense"), x[0, :8].half())),
        (ValueError, r"bias must be \(8,\) floats on cpu, found \(7,\)",
         lambda: matmul(x, prepare(packed, "reference"), x[0, :7])),
        (ValueError, "weight must be tiles of Spec.bits=8, .*, found those of another spec",
         lambda: w4_matmul(x, [tiles], 8, 32, 8, 32, "minimum", torch.float16, "cpu", None, False)),
        (BackendUnavailable, 'there is no backend "fast"', lambda: prepare(packed, "fast")),
    ):  # fmt: skip
        with pytest.raises(error, match=match) as raised:
            call()
        assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match=r"x must be \(..., 32\)"):
        prepared = prepare(zeros(Q4_1, (8, 32), "meta"))
        matmul(torch.empty(2, 31, device="meta"), prepared)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert matmul(x, matrix).shape == (2, 8)
