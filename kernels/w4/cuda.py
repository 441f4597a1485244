"""The CUDA decode matmul (csrc/cuda/w4_matmul.cu): 1 to 8 rows of x times a packed matrix."""

import ctypes
from dataclasses import fields
from functools import cache

import torch
from torch import Tensor

from engine.kernels import native
from engine.kernels.dispatch import CUDA_ROWS
from engine.kernels.w4.format import SCHEMES
from engine.kernels.w4.fusion import ACTIVATIONS, NORMS, PLAIN, Fusion
from engine.kernels.w4.launch import Stripes, stripes
from engine.kernels.w4.layout_gpu import GpuMatrix

MAX_ROWS = CUDA_ROWS
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

    borrowed: dict[str, Tensor]  # whose memory it points to

    POINTERS = (
        *("x", "delta", "post", "stream", "norm", "norm_bias", "bias", "gate", "add", "live", "y"),
        *("sums", "out_sums", "parts", "counters"),
    )
    _fields_ = [
        ("weights", Matrix),
        *((name, ctypes.c_uint64) for name in POINTERS),
        *((name, ctypes.c_int64) for name in ("x_stride", "y_stride", "sum_parts")),
        *((name, ctypes.c_int32) for name in ("m", "type", "x_type", "y_type")),
        *((name, ctypes.c_int32) for name in ("norm_kind", "activation")),
        *((name, ctypes.c_float) for name in ("norm_eps", "cap")),
        *((name, ctypes.c_int32) for name in ("gated", "ranges", "overlap")),
    ]


def matmul(
    x: Tensor,
    weights: GpuMatrix,
    bias: Tensor | None = None,
    fusion: Fusion = PLAIN,
    out_dtype: torch.dtype | None = None,
    overlap: bool = False,
) -> Tensor:
    """x (M, K) float16 or bfloat16 with M <= 8 -> (M, N) in `out_dtype` (of x, or float32).

    With a gate that W stacks (M, N / 2). `overlap`: the kernel may start before the one before it
    ends (compute capability 9.0), whose outputs it reads only as activations. Raises ValueError,
    TypeError or RuntimeError (CUDA's own).
    """
    if not x.is_cuda:
        raise ValueError(f"x must be on a GPU, found {x.device}")
    (n, k), outputs = weights.shape, weights.shape[0] // 2 if fusion.gated else weights.shape[0]
    y = torch.empty(len(x), outputs, dtype=out_dtype or x.dtype, device=x.device)
    sizes = stripes(n, k, cores_of(x.device), fusion.gated)
    parts = torch.empty(sizes.part_values(len(x)), dtype=torch.float32, device=x.device)
    counters = torch.zeros(sizes.tiles, dtype=torch.int32, device=x.device)
    call = describe(
        x, weights, y, bias, fusion, sizes=sizes, parts=parts, counters=counters, overlap=overlap
    )
    launch(call, x.device)
    return y


@cache
def cores_of(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch(call: Call, device: torch.device) -> None:
    """On the device's current stream. RuntimeError with CUDA's own message."""
    stream = torch.cuda.current_stream(device)
    with torch.cuda.device(device):
        native.load("cuda").w4_matmul(ctypes.addressof(call), stream.cuda_stream)


def describe(
    x: Tensor,
    weights: GpuMatrix,
    y: Tensor,
    bias: Tensor | None = None,
    fusion: Fusion = PLAIN,
    dtype: torch.dtype | None = None,
    *,
    sizes: Stripes,
    parts: Tensor | None = None,
    counters: Tensor | None = None,
    sums: Tensor | None = None,
    out_sums: Tensor | None = None,
    overlap: bool = False,
) -> Call:
    """The kernel's arguments, which keep the tensors. Raises ValueError or TypeError.

    `dtype`, of products, is that of x where it is not float32. With several slices `parts` holds at
    least `sizes.part_values(M)` float32, and `counters` int32 zeros for every tile. `sums` (any
    number, 2, M) are the sums over x's squares and values in parts, for its norm; `out_sums` (tiles
    or more, 2, M) get those of y.
    """
    dtype = x.dtype if dtype is None else dtype
    bias = None if bias is None else bias.contiguous()  # the kernel reads one value after another
    check(x, weights, y, bias, fusion, dtype)
    m = len(x)
    scratch = {
        "parts": (parts, (sizes.part_values(m),), torch.float32),
        "counters": (counters, (sizes.tiles if sizes.slices > 1 else 0,), torch.int32),
        "sums": (sums, (0, 2, m), torch.float32),
        "out_sums": (out_sums, (sizes.tiles, 2, m), torch.float32),
    }
    for name, (tensor, least, kind) in scratch.items():
        if tensor is not None:
            check_scratch(name, tensor, least, kind, x.device)
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
    borrowed = {"x": x, "y": y, "bias": bias} | tensors(fusion)
    borrowed |= {name: tensor for name, (tensor, _, _) in scratch.items()}
    present = {name: tensor for name, tensor in borrowed.items() if tensor is not None}
    call = Call(
        weights=matrix,
        **{name: tensor.data_ptr() for name, tensor in present.items()},
        x_stride=x.stride(0),
        y_stride=y.stride(0),
        sum_parts=0 if sums is None else len(sums),
        m=m,
        type=TYPES.index(dtype),
        x_type=TYPES.index(x.dtype),
        y_type=TYPES.index(y.dtype),
        norm_kind=NORMS.index(fusion.norm),
        activation=ACTIVATIONS.index(fusion.activation),
        norm_eps=fusion.epsilon,
        cap=fusion.cap,
        gated=fusion.gated,
        ranges=sizes.ranges,
        overlap=overlap,
    )
    call.borrowed = present | weights.tensors()
    return call


def tensors(fusion: Fusion) -> dict[str, Tensor | None]:
    """By the names of `Call`'s pointers."""
    found = {field.name: getattr(fusion, field.name) for field in fields(fusion)}
    found["norm"] = found.pop("norm_weight")
    return {name: found[name] for name in Call.POINTERS if name in found}


def check_scratch(
    name: str, tensor: Tensor, least: tuple[int, ...], kind: torch.dtype, device: torch.device
) -> None:
    """ValueError unless the first dimension is at least that long, the others as they are."""
    fits = tensor.dim() == len(least) and tensor.shape[1:] == least[1:]
    if not fits or len(tensor) < least[0] or tensor.dtype != kind or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be a contiguous {least} {kind} or longer, "
            f"found {tuple(tensor.shape)} {tensor.dtype}"
        )
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, x is on {device}")


def check(
    x: Tensor,
    weights: GpuMatrix,
    y: Tensor,
    bias: Tensor | None,
    fusion: Fusion,
    dtype: torch.dtype,
) -> None:
    """Raises TypeError or ValueError, one sentence, for what the kernel does not take; `dtype` is
    that of its products, float16 or bfloat16."""
    n, k = weights.shape
    if dtype not in TYPES[:2] or x.dtype not in (dtype, torch.float32):
        raise TypeError(f"x must be float16 or bfloat16, found {x.dtype}")
    if y.dtype not in (dtype, torch.float32):
        raise TypeError(f"y must be {dtype} or torch.float32, found {y.dtype}")
    if x.dim() != 2 or x.shape[1] != k or len(x) > MAX_ROWS:
        raise ValueError(f"x must be (M, {k}) with M <= {MAX_ROWS}, found {tuple(x.shape)}")
    if fusion.gated and n % 2:
        raise ValueError(f"gated weights need an even number of rows, found {n}")
    if weights.codes.device != x.device:
        raise ValueError(f"weight is on {weights.codes.device}, x is on {x.device}")
    rows, outputs, wide = (len(x), k), (len(x), n // 2 if fusion.gated else n), torch.float32
    expected = {"x": (x.dtype, rows), "y": (y.dtype, outputs), "bias": (dtype, (n,))}
    expected |= {name: (wide, rows) for name in ("delta", "stream")}
    expected |= {name: (wide, outputs) for name in ("gate", "add")}
    expected |= {name: (wide, (k,)) for name in ("norm", "norm_bias", "post")}
    expected["live"] = (torch.int32, (len(x),))
    strides = {2: {"y": y.stride(), "gate": y.stride(), "add": y.stride()}, 1: {}}
    for name, tensor in ({"x": x, "y": y, "bias": bias} | tensors(fusion)).items():
        if tensor is None:
            continue
        kind, shape = expected[name]
        stride = strides[len(shape)].get(name, x.stride() if len(shape) == 2 else (1,))
        lies = tensor.stride() == stride and (stride[-1] == 1 or shape[-1] <= 1)
        if tensor.dtype != kind or tuple(tensor.shape) != shape or not (lies or 0 in shape):
            raise ValueError(
                f"{name} must be a contiguous {shape} {kind}, "
                f"found {tuple(tensor.shape)} {tensor.dtype} with stride {tensor.stride()}"
            )
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x is on {x.device}")
