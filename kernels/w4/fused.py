"""The Triton matmul on packed weights: any number of rows, bias and gate fused."""

from collections.abc import Iterator
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from engine.kernels import dispatch
from engine.kernels.w4 import gemm, gemv, launch
from engine.kernels.w4.dequantize import Format
from engine.kernels.w4.launch import Launch
from engine.kernels.w4.layout_gpu import GpuMatrix

HALVES = (torch.float16, torch.bfloat16)
TRITON_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
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
            kind = format_of(weight, k, 1)
            sizes = launch.choose(len(rows), n, k, kind, *limits(x.device))
        bias = None if bias is None else bias.contiguous()  # kernels read one value after another
        with torch.cuda.device_of(x):
            RUN[sizes.kernel](aligned(rows), weight, bias, y, gated, sizes)
    return y.view(*x.shape[:-1], outputs)


def matmul_transposed(y: Tensor, weight: GpuMatrix) -> Tensor:
    """y (..., N) float16 or bfloat16 -> y @ W, (..., K) as y: the gradient of `matmul` in x.

    W is dequantized to the dtype of y. Raises what `matmul` does.
    """
    n, k = weight.shape
    check_operand("y", y, n, weight)
    rows = y.reshape(-1, n)
    total = torch.zeros(len(rows), triton.cdiv(k, ALIGN) * ALIGN, device=y.device)
    with torch.cuda.device_of(y):
        for first, w in dense_parts(weight, total.shape[1], y.dtype, launch.DENSE.WARPS):
            total += rows[:, first : first + len(w)] @ w
    x = total[:, :k].to(y.dtype)
    if weight.perm is not None:
        x = x.index_select(1, weight.perm.argsort())
    return x.view(*y.shape[:-1], k)


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
    """Raises TypeError or ValueError, one sentence, for what `matmul` does not take."""
    n, k = weight.shape
    check_operand("x", x, k, weight)
    if out_dtype not in (None, x.dtype, torch.float32):
        raise TypeError(f"out_dtype must be {x.dtype} or torch.float32, found {out_dtype}")
    if gated and n % 2:
        raise ValueError(f"gated weights need an even number of rows, found {n}")
    if bias is not None and (bias.dtype != x.dtype or bias.shape != (n,)):
        raise ValueError(f"bias must be ({n},) {x.dtype}, found {tuple(bias.shape)} {bias.dtype}")
    if bias is not None and bias.device != x.device:
        raise ValueError(f"bias is on {bias.device}, x is on {x.device}")


def check_operand(name: str, x: Tensor, width: int, weight: GpuMatrix) -> None:
    """The same of an input (..., width); BackendUnavailable where Triton cannot run."""
    if not x.is_cuda:
        dispatch.require("triton")
        if not knobs.runtime.interpret:
            raise ValueError(f"{name} must be on a GPU, found {x.device}")
    if x.dtype not in HALVES:
        raise TypeError(f"{name} must be float16 or bfloat16, found {x.dtype}")
    if x.dim() == 0 or x.shape[-1] != width:
        raise ValueError(f"{name} must be (..., {width}), found {tuple(x.shape)}")
    if weight.codes.device != x.device:
        raise ValueError(f"weight is on {weight.codes.device}, {name} is on {x.device}")


def run_gemv(
    x: Tensor, weight: GpuMatrix, bias: Tensor | None, y: Tensor, gated: bool, sizes: Launch
) -> None:
    """Writes y (M, N), or (M, N / 2) with a gate, of x (M, K) that is `aligned`."""
    (n, k), m, kind = weight.shape, len(x), format_of(weight, x.shape[1], 1)
    grid = sizes.grid(m, n, k, kind, gated)
    parts = torch.empty(sizes.part_values(m, grid), dtype=torch.float32, device=x.device)
    counters = torch.zeros(grid[0] * grid[2], dtype=torch.int32, device=x.device)
    gemv.gemv_kernel[grid](
        x, *pointers(weight), bias, y, parts, counters, m, n, x.shape[1], x.stride(0), y.shape[1],
        sizes.TILES, FORMAT=kind, DTYPE=TRITON_TYPES[x.dtype], GATED=gated,
        ACTIVATION="silu" if gated else "", **gemv_options(sizes),
    )  # fmt: skip


def gemv_options(sizes: Launch) -> dict[str, int | None]:
    return {
        "BLOCK_M": sizes.BLOCK_M, "WARPS": sizes.WARPS, "CHUNKS": sizes.CHUNKS,
        "num_warps": sizes.WARPS, "num_stages": sizes.num_stages, "maxnreg": sizes.maxnreg,
        "enable_fp_fusion": True,  # from Triton 3.10 on it is not the default
    }  # fmt: skip


def run_gemm(
    x: Tensor, weight: GpuMatrix, bias: Tensor | None, y: Tensor, gated: bool, sizes: Launch
) -> None:
    """As `run_gemv`."""
    n, splits = weight.shape[0], sizes.SPLITS
    parts = y
    if splits > 1:
        parts = torch.empty(splits, len(x), n, dtype=torch.float32, device=x.device)
    tiles = triton.cdiv(y.shape[1], (8 if gated else 16) * sizes.WARPS)
    gemm.gemm_kernel[(tiles * triton.cdiv(len(x), sizes.BLOCK_M), splits)](
        x, *pointers(weight), bias, parts, len(x), n, x.shape[1], x.stride(0),
        FORMAT=format_of(weight, x.shape[1], 1), GATED=gated, BLOCK_M=sizes.BLOCK_M,
        WARPS=sizes.WARPS, SPLITS=splits, num_warps=sizes.WARPS, num_stages=sizes.num_stages,
        enable_fp_fusion=True,
    )  # fmt: skip
    if splits > 1:
        reduce(parts, bias, y, gated)


def run_dense(
    x: Tensor, weight: GpuMatrix, bias: Tensor | None, y: Tensor, gated: bool, sizes: Launch
) -> None:
    """As `run_gemv`."""
    product = y
    if gated or bias is not None or y.dtype != x.dtype:
        product = torch.empty(len(x), weight.shape[0], dtype=x.dtype, device=x.device)
    for first, w in dense_parts(weight, x.shape[1], x.dtype, sizes.WARPS):
        torch.mm(x, w.T, out=product[:, first : first + len(w)])
    if product is not y:
        reduce(product[None], bias, y, gated)


def dense_parts(
    weight: GpuMatrix, k: int, dtype: torch.dtype, warps: int
) -> Iterator[tuple[int, Tensor]]:
    """The first row of every part and its weights (R, `k`), each in the memory of the one before.

    `k` is K or a multiple of ALIGN, as `aligned` pads x.
    """
    n, kind = weight.shape[0], format_of(weight, k, 1)
    step = max(1, launch.DENSE_WEIGHTS // k)
    w = torch.empty(min(step, n), k, dtype=dtype, device=weight.codes.device)
    for first in range(0, n, step):
        part = w[: n - first]
        gemm.dense_kernel[(triton.cdiv(len(part), 16 * warps), triton.cdiv(k, kind.chunk))](
            *pointers(weight), part, first, first + len(part), k,
            FORMAT=kind, WARPS=warps, num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
        yield first, part


RUN = {"gemv": run_gemv, "gemm": run_gemm, "dense": run_dense}


def reduce(parts: Tensor, bias: Tensor | None, y: Tensor, gated: bool) -> None:
    """Writes y, as `run_gemv`, of products in parts (splits, M, N) that are added up."""
    splits, m, n = parts.shape
    gemm.reduce_kernel[(m, triton.cdiv(y.shape[1], REDUCE_BLOCK))](
        parts, bias, y, m, n, GATED=gated, SPLITS=splits, BLOCK_N=REDUCE_BLOCK,
        enable_fp_fusion=True,
    )  # fmt: skip


def pointers(weight: GpuMatrix) -> tuple[Tensor | None, ...]:
    """codes as words, scales, offsets, super-scales, codebook."""
    offsets = weight.mins if weight.zeros is None else weight.zeros
    return weight.codes.view(torch.int32), weight.scales, offsets, weight.supers, weight.codebook


def format_of(weight: GpuMatrix, k: int, step_chunks: int) -> Format:
    """What the kernel is compiled for, where a step takes so many chunks of `k`."""
    spec = weight.spec
    even = k % (512 // spec.bits * step_chunks) == 0
    return Format(spec.scheme, spec.bits, spec.group, even, asm=not knobs.runtime.interpret)


@cache
def limits(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and the most shared memory of a block, in bytes."""
    if device.type != "cuda":
        return 1, launch.WIDE_BYTES  # interpreted
    index = torch.cuda.current_device() if device.index is None else device.index
    facts = triton.runtime.driver.active.utils.get_device_properties(index)
    return facts["multiprocessor_count"], facts["max_shared_mem"]
