"""torch.library ops on packed matrices, for autograd, torch.compile and export.

`shallow::w4_matmul` is x @ W.T + bias; `shallow::w4_matmul_transposed`, y @ W, is its gradient in x
and the other way round. To both a matrix is a list of tensors, as its backend reads them, and the
scalars of its spec; `prepare` makes them from a `Packed`, `restore` gives it back:

    reference, dense     codes, scales, ... as in `Packed`, those that there are
    cpu                  one tensor, the bytes of the CPU kernels' layout
    triton, cuda, gpu    as in `Packed`, with codes in GPU order

"dense" is torch's product, in the type of x, with W dequantized anew at each call: for training.
"gpu" takes the CUDA kernel for up to 8 rows of x, where it was built, and Triton for more. Scales
and minimums get gradients too, in all layouts but that of the CPU kernels.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from engine.kernels import dispatch
from engine.kernels.dtypes import name_of
from engine.kernels.w4 import cpu, cuda, reference
from engine.kernels.w4.cpu import CpuWeight
from engine.kernels.w4.format import Packed, Spec, expected_tensors, unpack, validate
from engine.kernels.w4.layout_gpu import GpuMatrix, codes_shape, from_gpu, to_gpu

MATRIX = (
    "Tensor[] weight, int n, int k, int bits, int group, str scheme, ScalarType scale_dtype, "
    "str backend"
)
DEVICES = ("cpu", "cuda")
PLAIN = ("reference", "dense")  # as in `Packed`


@dataclass(frozen=True, eq=False)
class Prepared:
    """One (N, K) matrix as the ops take it."""

    spec: Spec
    shape: tuple[int, int]
    backend: str  # one of BACKENDS, "dense" or "gpu"
    tensors: dict[str, Tensor]  # by the names of `Packed` and in its order; for "cpu" "tiles"

    def arguments(self) -> tuple:
        """Of the ops, from `weight` to `backend`."""
        spec = self.spec
        scalars = (spec.bits, spec.group, spec.scheme, spec.scale_dtype)
        return list(self.tensors.values()), *self.shape, *scalars, self.backend


def prepare(packed: Packed, backend: str | None = None) -> Prepared:
    """Lays a matrix out for `backend`, one of BACKENDS or "dense"; by default for the best on its
    device.

    Tensors that stay as they are, are shared. Raises BackendUnavailable where a backend that was
    asked for cannot run, ValueError or TypeError for what it cannot hold.
    """
    validate(packed)
    if backend is None:
        backend = _automatic(packed.device.type)
    elif backend != "dense":
        dispatch.require(backend)
    if backend == "cpu":
        tensors = {"tiles": CpuWeight.from_packed(packed).to_bytes()}
    elif backend in PLAIN:
        tensors = packed.tensors()
    else:
        tensors = to_gpu(packed).tensors()
    return Prepared(packed.spec, packed.shape, backend, tensors)


def restore(matrix: Prepared) -> Packed:
    """What `prepare` was given, bit for bit."""
    if matrix.backend == "cpu":
        return CpuWeight.from_bytes(matrix.tensors["tiles"]).restore(matrix.spec)
    if matrix.backend in PLAIN:
        return Packed(matrix.spec, matrix.shape, **matrix.tensors)
    return from_gpu(_gpu(matrix))


def matmul(x: Tensor, matrix: Prepared, bias: Tensor | None = None, exact: bool = False) -> Tensor:
    """x (..., K), bias (N,) -> x @ W.T + bias, (..., N) as x, with gradients in x, bias, and the
    scales and minimums of `matrix`.

    x is float16 or bfloat16, on a CPU float32 too, for the reference of any float dtype. `exact`
    keeps the CPU kernels from rounding x to 8 bits; the gradient is that of the exact product in
    either case. Raises ValueError, TypeError, or BackendUnavailable.
    """
    return w4_matmul(x, *matrix.arguments(), bias, exact)


def autocast(x: Tensor) -> Tensor:
    """x in autocast's dtype where that is on, as `nn.Linear` has it."""
    kind = x.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return x.to(torch.get_autocast_dtype(kind)) if on else x


@torch.library.custom_op(
    "shallow::w4_matmul",
    mutates_args=(),
    device_types=DEVICES,
    schema=f"(Tensor x, {MATRIX}, Tensor? bias, bool exact) -> Tensor",
)
def w4_matmul(x, weight, n, k, bits, group, scheme, scale_dtype, backend, bias, exact):
    """`matmul` of a matrix in parts."""
    matrix = _matrix(weight, n, k, bits, group, scheme, scale_dtype, backend)
    before = _fitting("x", x, k)
    _check_floats(x, bias, n, backend == "dense")
    if backend == "cpu":
        return cpu.matmul(x, _tiles(matrix), bias, "exact" if exact else "int8")
    if backend == "reference":
        return reference.matmul(x, restore(matrix), bias)
    if backend == "dense":
        return functional.linear(x, unpack(restore(matrix)).to(x.dtype), bias)
    rows = before.numel()
    few = backend == "gpu" and rows <= cuda.MAX_ROWS and _cuda_runs()
    if rows and (few or backend == "cuda"):
        return cuda.matmul(x.reshape(rows, k).contiguous(), _gpu(matrix), bias).view(*before, n)
    from engine.kernels.w4 import fused

    return fused.matmul(x, _gpu(matrix), bias)


@torch.library.custom_op(
    "shallow::w4_matmul_transposed",
    mutates_args=(),
    device_types=DEVICES,
    schema=f"(Tensor y, {MATRIX}) -> Tensor",
)
def w4_matmul_transposed(y, weight, n, k, bits, group, scheme, scale_dtype, backend):
    """y (..., N) -> y @ W, (..., K) as y; on a GPU Triton dequantizes W and torch multiplies."""
    matrix = _matrix(weight, n, k, bits, group, scheme, scale_dtype, backend)
    _fitting("y", y, n)
    if backend == "cpu":
        return cpu.matmul_transposed(y, _tiles(matrix))
    if backend == "reference":
        return reference.matmul_transposed(y, restore(matrix))
    if backend == "dense":
        return y @ unpack(restore(matrix)).to(y.dtype)
    from engine.kernels.w4 import fused

    return fused.matmul_transposed(y, _gpu(matrix))


@w4_matmul.register_fake
def _(x, weight, n, k, *_):
    return x.new_empty((*_fitting("x", x, k), n))


@w4_matmul_transposed.register_fake
def _(y, weight, n, k, *_):
    return y.new_empty((*_fitting("y", y, n), k))


def _fitting(name: str, x: Tensor, width: int) -> torch.Size:
    """The dimensions before the last one, which must be `width`."""
    if x.dim() == 0 or x.shape[-1] != width:
        raise ValueError(f"{name} must be (..., {width}), found {tuple(x.shape)}")
    return x.shape[:-1]


def _check_floats(x: Tensor, bias: Tensor | None, n: int, alike: bool) -> None:
    """TypeError for such an x, ValueError for such a bias; `alike`: both are of one dtype."""
    if not x.is_floating_point():
        raise TypeError(f"x must be floats, found {x.dtype}")
    if bias is None:
        return
    kind = str(x.dtype) if alike else "floats"
    fits = bias.dtype == x.dtype if alike else bias.is_floating_point()
    if bias.shape != (n,) or not fits or bias.device != x.device:
        raise ValueError(
            f"bias must be ({n},) {kind} on {x.device}, "
            f"found {tuple(bias.shape)} {bias.dtype} on {bias.device}"
        )


def _keep(ctx, inputs, output) -> None:
    x, weight, *scalars = inputs
    learns = any(tensor.requires_grad for tensor in weight)
    ctx.save_for_backward(x if learns else None, *weight)
    ctx.scalars = scalars[:7]  # n to backend


def _matmul_backward(ctx, dy: Tensor) -> tuple:
    x, *weight = ctx.saved_tensors  # read once: a checkpointed layer gives them a single time
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        dx = w4_matmul_transposed(dy, weight, *ctx.scalars)
    if ctx.needs_input_grad[9]:
        dbias = dy.reshape(-1, dy.shape[-1]).sum(0)
    return dx, _weight_gradients(ctx, weight, dy, x), *(None for _ in ctx.scalars), dbias, None


def _transposed_backward(ctx, dx: Tensor) -> tuple:
    y, *weight = ctx.saved_tensors
    dy = None
    if ctx.needs_input_grad[0]:
        dy = w4_matmul(dx, weight, *ctx.scalars, None, True)
    return dy, _weight_gradients(ctx, weight, y, dx), *(None for _ in ctx.scalars)


def _weight_gradients(
    ctx, weight: list[Tensor], y: Tensor | None, x: Tensor
) -> list[Tensor | None]:
    """Of each tensor of W, whose own gradient is y.T @ x: scales and minimums have one."""
    needs = ctx.needs_input_grad[1]
    found: list[Tensor | None] = [None] * len(weight)
    if y is None or not any(needs):
        return found
    matrix = _matrix(weight, *ctx.scalars)
    if matrix.backend == "reference":
        y, x = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (y, x))
    dw = y.reshape(-1, y.shape[-1]).T @ x.reshape(-1, x.shape[-1])
    gradients = reference.scale_gradients(dw, restore(matrix))
    for index, (name, tensor) in enumerate(matrix.tensors.items()):
        if needs[index] and name in gradients:
            found[index] = gradients[name].to(tensor.dtype)
    return found


w4_matmul.register_autograd(_matmul_backward, setup_context=_keep)
w4_matmul_transposed.register_autograd(_transposed_backward, setup_context=_keep)


def _matrix(weight, n, k, bits, group, scheme, scale_dtype, backend) -> Prepared:
    """Raises ValueError where a tensor is not what its backend reads; the values stay unread."""
    spec = Spec(bits, group, scheme, scale_dtype)
    names = ["tiles"] if backend == "cpu" else [*expected_tensors(spec, (n, k)), "perm"]
    if len(weight) != len(names) and (backend == "cpu" or len(weight) != len(names) - 1):
        raise ValueError(f"weight must be {names}, found {len(weight)} tensors")
    matrix = Prepared(spec, (n, k), backend, dict(zip(names, weight, strict=False)))
    if backend != "cpu":
        _check(matrix)
    return matrix


def _check(matrix: Prepared) -> None:
    spec, (n, k) = matrix.spec, matrix.shape
    sizes = expected_tensors(spec, (n, k)) | {"perm": ((k,), torch.int32)}
    if matrix.backend not in PLAIN:
        sizes["codes"] = codes_shape(spec, matrix.shape), torch.uint8
    for name, tensor in matrix.tensors.items():
        size, dtype = sizes[name]
        if tensor.shape != size or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be a contiguous {size} {dtype}, "
                f"found {tuple(tensor.shape)} {tensor.dtype} with stride {tensor.stride()}"
            )


def _tiles(matrix: Prepared) -> CpuWeight:
    tiles = CpuWeight.from_bytes(matrix.tensors["tiles"])
    if tiles.shape != matrix.shape:
        raise ValueError(f"weight must be {matrix.shape}, found {tiles.shape}")
    spec = matrix.spec
    scale_dtype = name_of(spec.scale_dtype)
    if not tiles.tiles.holds(spec.bits, spec.group, spec.scheme, scale_dtype):
        raise ValueError(f"weight must be tiles of {spec}, found those of another spec")
    return tiles


def _gpu(matrix: Prepared) -> GpuMatrix:
    return GpuMatrix(matrix.spec, matrix.shape, **matrix.tensors)


def _automatic(device: str) -> str:
    if device == "meta":
        return "reference"
    if device not in DEVICES:
        raise ValueError(f"weights must be on a CPU or a GPU of CUDA, found {device}")
    backend = dispatch.choose(dispatch.MORE_ROWS, device)
    return "gpu" if backend == "triton" else backend


@cache
def _cuda_runs() -> bool:
    return dispatch.choose(dispatch.FEW_ROWS, "cuda") == "cuda"
