"""What the 4-bit ops are held to on every backend."""

from dataclasses import replace

import torch
from support.close import assert_close
from support.packed import random_packed
from torch.library import opcheck

from engine.kernels.w4.format import Packed, Spec, unpack
from engine.kernels.w4.ops import Prepared, matmul, prepare, w4_matmul, w4_matmul_transposed

BOUND = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# One of every code width, table, group layout and parameter layout.
SPECS = [
    Spec(4, 32, "minimum"),
    Spec(4, 16, "zero", torch.bfloat16),
    Spec(4, 128, "symmetric", torch.float32),
    Spec(4, 0, "codebook"),
    Spec(8, 16, "symmetric", torch.float32),
    Spec(8, 64, "minimum"),
    Spec(4, 32, "kquant"),
]


def inputs(rng: torch.Generator, k: int, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """x in every shape: one row, none, many, in three dimensions, with strides of its own."""
    shapes = ((k,), (0, k), (1, k), (40, k), (2, 3, k), (2, 0, k))
    given = [torch.randn(*shape, generator=rng) for shape in shapes]
    given += [torch.randn(k, 3, generator=rng).T, torch.randn(4, 2 * k, generator=rng)[:, ::2]]
    return [x.to(device, dtype) for x in given]


def check_ops(rng: torch.Generator, matrix: Prepared, dtype: torch.dtype, device: str) -> None:
    """opcheck, with and without gradients and a bias."""
    n, k = matrix.shape
    bias = torch.randn(n, generator=rng).to(device, dtype).requires_grad_()
    for x in inputs(rng, k, dtype, device):
        tests = "test_schema", "test_autograd_registration", "test_faketensor"
        if x.dim() != 2 or len(x) == 40:
            tests += ("test_aot_dispatch_dynamic",)
        opcheck(w4_matmul, (x, *matrix.arguments(), None, False), test_utils=tests)
        x = x.detach().requires_grad_()
        opcheck(w4_matmul, (x, *matrix.arguments(), bias, True), test_utils=tests)
    for y in inputs(rng, n, dtype, device)[1::2]:
        opcheck(w4_matmul_transposed, (y.requires_grad_(), *matrix.arguments()))


def check_gradients(
    rng: torch.Generator, packed: Packed, backend: str | None, dtype: torch.dtype
) -> None:
    """y, dx and dbias against autograd in float64 on the unpacked weights."""
    (n, k), device = packed.shape, packed.device
    matrix, weight = prepare(packed, backend), unpack(packed).double()
    for shape in ((40, k), (3, 5, k)):
        x = torch.randn(*shape, generator=rng).to(device, dtype).requires_grad_()
        bias = torch.randn(n, generator=rng).to(device, dtype).requires_grad_()
        dy = torch.randn(*shape[:-1], n, generator=rng).to(device, dtype)
        y = matmul(x, matrix, bias, exact=True)
        wide = [tensor.detach().double().requires_grad_() for tensor in (x, bias)]
        expected = torch.nn.functional.linear(wide[0], weight, wide[1])
        assert y.dtype == dtype
        assert_close("y", expected, y, BOUND[dtype])
        found = torch.autograd.grad(y, (x, bias), dy)
        for name, ours, right in zip(
            ("dx", "dbias"), found, torch.autograd.grad(expected, wide, dy.double()), strict=True
        ):
            assert ours.dtype == dtype
            assert_close(name, right, ours, BOUND[dtype])


def case(rng: torch.Generator, spec: Spec, n: int = 34, k: int = 201) -> Packed:
    """Weights with x @ W.T of about unit RMS times sqrt(K), permuted every other time."""
    return random_packed(rng, n, k, spec, bool(torch.randint(2, (), generator=rng)))


def check_scale_gradients(
    rng: torch.Generator, packed: Packed, backend: str, dtype: torch.dtype
) -> None:
    """Those in scales and minimums: against differences of the loss in float64, in which it is
    linear, and against autograd through the formula of the format; both of y and of dx."""
    (n, k), matrix = packed.shape, prepare(packed, backend)
    learning = {name: matrix.tensors[name] for name in ("scales", "mins") if name in matrix.tensors}
    tensors = matrix.tensors | {name: t.requires_grad_() for name, t in learning.items()}
    learnt = Prepared(matrix.spec, matrix.shape, backend, tensors)
    x = torch.randn(40, k, generator=rng).to(packed.device, dtype)
    dy = torch.randn(40, n, generator=rng).to(packed.device, dtype)
    dw = dy.double().T @ x.double()
    products = matmul(x, learnt, exact=True), w4_matmul_transposed(dy, *learnt.arguments())
    for product, direction in zip(products, (dy, x), strict=True):
        found = torch.autograd.grad(product, list(learning.values()), direction)
        for (name, tensor), ours in zip(learning.items(), found, strict=True):
            assert ours.dtype == tensor.dtype
            right = torch.stack([slope(packed, name, group, dw) for group in range(packed.groups)])
            assert_close(name, right.T, ours, BOUND[dtype] + BOUND.get(tensor.dtype, 0))


def slope(packed: Packed, name: str, group: int, dw: torch.Tensor) -> torch.Tensor:
    """(N,) float64: how the sum of dw * W changes with a group's scale, or minimum, in each row."""
    tensor = packed.tensors()[name].detach()
    change = torch.zeros_like(tensor)
    change[:, group] = 2.0 ** (tensor[:, group].abs().float().clamp_min(1e-3).log2().floor() - 2)
    ends = [tensor + sign * change for sign in (1, -1)]
    up, down = (unpack(replace(packed, **{name: end})).double() for end in ends)
    width = (ends[0] - ends[1]).double()[:, group]
    return (dw * (up - down)).sum(1) / width
