"""The CUDA decode matmul (csrc/cuda/w4_matmul.cu): 1 to 8 rows of x times a packed matrix."""

import ctypes
from dataclasses import dataclass

import torch

from engine.kernels import native
from engine.kernels.w4.format import SCHEMES
from engine.kernels.w4.layout_gpu import GpuMatrix

MAX_ROWS = 8
TYPES = (torch.float16, torch.bfloat16, torch.float32)  # numbered as in csrc/w4.h


class Matrix(ctypes.Structure):
    """w4::Matrix of csrc/w4.h."""

    POINTERS = ("codes", "scales", "zeros", "mins", "supers", "codebook", "perm")
    _fields_ = [
        *((name, ctypes.c_uint64) for name in POINTERS),
        *((name, ctypes.c_int64) for name in ("n", "k")),
        *((name, ctypes.c_int32) for name in ("bits", "group", "scheme", "scale_type")),
    ]


class Call(ctypes.Structure):
    """shallow::W4Matmul of csrc/cuda/w4_matmul.h."""

    POINTERS = ("x", "norm", "bias", "y")
    _fields_ = [
        ("weights", Matrix),
        *((name, ctypes.c_uint64) for name in POINTERS),
        ("x_stride", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("m", "x_type", "y_type")),
        *((name, ctypes.c_float) for name in ("norm_eps", "norm_offset")),
        *((name, ctypes.c_int32) for name in ("gated", "overlap", "reserved")),
    ]


@dataclass(frozen=True, eq=False)
class Norm:
    """RMSNorm of x: x / sqrt(mean(x^2) + eps) * (weight + offset)."""

    weight: torch.Tensor  # (K,), dtype of x
    eps: float
    offset: float = 0.0  # 1 where weights are stored less one (Gemma)


def matmul(
    x: torch.Tensor,
    weights: GpuMatrix,
    bias: torch.Tensor | None = None,
    norm: Norm | None = None,
    gated: bool = False,
    out_dtype: torch.dtype | None = None,
    overlap: bool = False,
) -> torch.Tensor:
    """x (M, K) float16 or bfloat16 with M <= 8 -> (M, N) in `out_dtype` (of x, or float32).

    `gated`: the matrix stacks a gate and an up projection; silu(gate) * up, (M, N / 2).
    `overlap`: the kernel may start before the one before it ends (compute capability 9.0), whose
    outputs it reads only as x. Raises ValueError, TypeError or RuntimeError (CUDA's own).
    """
    if not x.is_cuda:
        raise ValueError(f"x must be on a GPU, found {x.device}")
    n = weights.shape[0] // 2 if gated else weights.shape[0]
    y = torch.empty(len(x), n, dtype=out_dtype or x.dtype, device=x.device)
    call = describe(x, weights, y, bias, norm, gated, overlap)
    stream = torch.cuda.current_stream(x.device)
    with torch.cuda.device(x.device):
        native.load("cuda").w4_matmul(ctypes.addressof(call), stream.cuda_stream)
    return y


def describe(
    x: torch.Tensor,
    weights: GpuMatrix,
    y: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm: Norm | None = None,
    gated: bool = False,
    overlap: bool = False,
) -> Call:
    """The kernel's arguments; they borrow the tensors' memory. Raises ValueError or TypeError."""
    check(x, weights, y, bias, norm, gated)
    spec, (n, k) = weights.spec, weights.shape
    matrix = Matrix(
        **{name: tensor.data_ptr() for name, tensor in weights.tensors().items()},
        n=n,
        k=k,
        bits=spec.bits,
        group=spec.group,
        scheme=SCHEMES.index(spec.scheme),
        scale_type=TYPES.index(spec.scale_dtype),
    )
    return Call(
        weights=matrix,
        x=x.data_ptr(),
        norm=norm.weight.data_ptr() if norm else 0,
        bias=0 if bias is None else bias.data_ptr(),
        y=y.data_ptr(),
        x_stride=x.stride(0),
        m=len(x),
        x_type=TYPES.index(x.dtype),
        y_type=TYPES.index(y.dtype),
        norm_eps=norm.eps if norm else 0.0,
        norm_offset=norm.offset if norm else 0.0,
        gated=gated,
        overlap=overlap,
    )


def check(
    x: torch.Tensor,
    weights: GpuMatrix,
    y: torch.Tensor,
    bias: torch.Tensor | None,
    norm: Norm | None,
    gated: bool,
) -> None:
    n, k = weights.shape
    if x.dtype not in TYPES[:2]:
        raise TypeError(f"x must be float16 or bfloat16, found {x.dtype}")
    if y.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"y must be {x.dtype} or torch.float32, found {y.dtype}")
    if x.dim() != 2 or x.shape[1] != k or len(x) > MAX_ROWS:
        raise ValueError(f"x must be (M, {k}) with M <= {MAX_ROWS}, found {tuple(x.shape)}")
    if gated and n % 2:
        raise ValueError(f"gated weights need an even number of rows, found {n}")
    if x.stride(1) != 1 and x.shape[1] > 1:
        raise ValueError(f"rows of x must be contiguous, found stride {x.stride()}")
    expected = {
        "y": (y, y.dtype, (len(x), n // 2 if gated else n)),
        "bias": (bias, x.dtype, (n,)),
        "norm": (None if norm is None else norm.weight, x.dtype, (k,)),
    }
    if weights.codes.device != x.device:
        raise ValueError(f"weight is on {weights.codes.device}, x is on {x.device}")
    for name, (tensor, dtype, shape) in expected.items():
        if tensor is None:
            continue
        if tensor.dtype != dtype or tuple(tensor.shape) != shape or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be a contiguous {shape} {dtype}, "
                f"found {tuple(tensor.shape)} {tensor.dtype} with stride {tensor.stride()}"
            )
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x is on {x.device}")
