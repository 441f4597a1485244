"""The Triton matmul on packed weights: any number of rows, bias and gate fused."""

from functools import cache

import torch
import triton
from torch import Tensor
from triton import knobs

from engine.kernels import dispatch
from engine.kernels.w4 import gemm, gemv, launch
from engine.kernels.w4.dequantise import Format
from engine.kernels.w4.launch import Launch
from engine.kernels.w4.layout_gpu import GpuMatrix

DTYPES = (torch.float16, torch.bfloat16)
ALIGN = 16  # elements and bytes; Triton compiles a kernel for multiples of 16, and one for the rest
REDUCE_BLOCK = 512  # outputs of a program


def matmul(
    x: Tensor,
    weight: GpuMatrix,
    bias: Tensor | None = None,
    gated: bool = False,
    out_dtype: torch.dtype | None = None,
    sizes: Launch | None = None,
) -> Tensor:
    """x (..., K) float16 or bfloat16, bias (N,) as x -> x @ W.T + bias, (..., N) in `out_dtype`.

    `gated`: W stacks a gate and an up projection; silu(gate) * up, (..., N / 2). `out_dtype` is
    that of x (the default) or float32. `sizes` overrides the launch table. Raises ValueError,
    TypeError, or BackendUnavailable where there is no GPU.
    """
    check(x, weight, bias, gated, out_dtype)
    n, k = weight.shape
    outputs = n // 2 if gated else n
    rows = x.reshape(-1, k)
    y = torch.empty(len(rows), outputs, dtype=out_dtype or x.dtype, device=x.device)
    if len(rows):
        if weight.perm is not None:
            rows = rows.index_select(1, weight.perm)
        if sizes is None:
            sizes = launch.choose(len(rows), n, k, weight.spec.bits, cores(x.device))
        RUN[sizes.kernel](aligned(rows), weight, bias, y, gated, sizes)
    return y.view(*x.shape[:-1], outputs)


def aligned(x: Tensor) -> Tensor:
    """x, or a copy with K padded with zeros, where its rows do not begin on multiples of 16.

    Groups and chunks are multiples of 16, so that the padded K counts as many as K: kernels take it
    for K, and read 16 bytes at a time.
    """
    m, k = x.shape
    columns = triton.cdiv(k, ALIGN) * ALIGN
    whole = k == columns and x.stride(1) == 1 and x.data_ptr() % ALIGN == 0
    if whole and (m == 1 or x.stride(0) % ALIGN == 0):
        return x[0][None] if m == 1 else x  # a stride like any other
    copy = x.new_zeros(m, columns)
    copy[:, :k] = x
    return copy


def check(
    x: Tensor, weight: GpuMatrix, bias: Tensor | None, gated: bool, out_dtype: torch.dtype | None
) -> None:
    n, k = weight.shape
    if not x.is_cuda:
        dispatch.require("triton")
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be float16 or bfloat16, found {x.dtype}")
    if out_dtype not in (None, x.dtype, torch.float32):
        raise TypeError(f"out_dtype must be {x.dtype} or torch.float32, found {out_dtype}")
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"x must be (..., {k}), found {tuple(x.shape)}")
    if gated and n % 2:
        raise ValueError(f"gated weights need an even number of rows, found {n}")
    if bias is not None and (bias.dtype != x.dtype or bias.shape != (n,)):
        raise ValueError(f"bias must be ({n},) {x.dtype}, found {tuple(bias.shape)} {bias.dtype}")
    for name, tensor in {"weight": weight.codes, "bias": bias}.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x is on {x.device}")


def run_gemv(
    x: Tensor, weight: GpuMatrix, bias: Tensor | None, y: Tensor, gated: bool, sizes: Launch
) -> None:
    programs = triton.cdiv(y.shape[1], 8 if gated else 16)
    gemv.gemv_kernel[(programs,)](
        x, *pointers(weight), bias, y, len(x), weight.shape[0], x.shape[1], x.stride(0),
        FORMAT=format_of(weight, x, sizes.WARPS), GATED=gated, BLOCK_M=sizes.BLOCK_M,
        WARPS=sizes.WARPS, num_warps=sizes.WARPS, num_stages=sizes.num_stages,
    )  # fmt: skip


def run_gemm(
    x: Tensor, weight: GpuMatrix, bias: Tensor | None, y: Tensor, gated: bool, sizes: Launch
) -> None:
    n, splits = weight.shape[0], sizes.SPLITS
    parts = y
    if splits > 1:
        parts = torch.empty(splits, len(x), n, dtype=torch.float32, device=x.device)
    tiles = triton.cdiv(y.shape[1], (8 if gated else 16) * sizes.WARPS)
    gemm.gemm_kernel[(tiles * triton.cdiv(len(x), sizes.BLOCK_M), splits)](
        x, *pointers(weight), bias, parts, len(x), n, x.shape[1], x.stride(0),
        FORMAT=format_of(weight, x, 1), GATED=gated, BLOCK_M=sizes.BLOCK_M, WARPS=sizes.WARPS,
        SPLITS=splits, num_warps=sizes.WARPS, num_stages=sizes.num_stages,
    )  # fmt: skip
    if splits > 1:
        reduce(parts, bias, y, gated)


def run_dense(
    x: Tensor, weight: GpuMatrix, bias: Tensor | None, y: Tensor, gated: bool, sizes: Launch
) -> None:
    (n, _), k = weight.shape, x.shape[1]
    product = y
    if gated or bias is not None or y.dtype != x.dtype:
        product = torch.empty(len(x), n, dtype=x.dtype, device=x.device)
    kind = format_of(weight, x, 1)
    step = max(1, launch.DENSE_WEIGHTS // k)
    w = torch.empty(min(step, n), k, dtype=x.dtype, device=x.device)
    for first in range(0, n, step):
        part = w[: n - first]
        gemm.dense_kernel[(triton.cdiv(len(part), 16 * sizes.WARPS), triton.cdiv(k, kind.chunk))](
            *pointers(weight), part, first, first + len(part), k,
            FORMAT=kind, WARPS=sizes.WARPS, num_warps=sizes.WARPS,
        )  # fmt: skip
        torch.mm(x, part.T, out=product[:, first : first + len(part)])
    if product is not y:
        reduce(product[None], bias, y, gated)


RUN = {"gemv": run_gemv, "gemm": run_gemm, "dense": run_dense}


def reduce(parts: Tensor, bias: Tensor | None, y: Tensor, gated: bool) -> None:
    splits, m, n = parts.shape
    gemm.reduce_kernel[(m, triton.cdiv(y.shape[1], REDUCE_BLOCK))](
        parts, bias, y, m, n, GATED=gated, SPLITS=splits, BLOCK_N=REDUCE_BLOCK
    )


def pointers(weight: GpuMatrix) -> tuple[Tensor | None, ...]:
    """codes as words, scales, offsets, super-scales, codebook."""
    offsets = weight.mins if weight.zeros is None else weight.zeros
    return weight.codes.view(torch.int32), weight.scales, offsets, weight.supers, weight.codebook


def format_of(weight: GpuMatrix, x: Tensor, step_chunks: int) -> Format:
    """What the kernel is compiled for, where a step takes so many chunks of K."""
    spec = weight.spec
    even = x.shape[1] % (512 // spec.bits * step_chunks) == 0
    return Format(spec.scheme, spec.bits, spec.group, even, asm=not knobs.runtime.interpret)


@cache
def cores(device: torch.device) -> int:
    if device.type != "cuda":
        return 1  # interpreted
    return torch.cuda.get_device_properties(device).multi_processor_count
