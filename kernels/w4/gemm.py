"""Many rows of x times a packed matrix: y.T = W @ x.T, so that dequantized weights go to the tensor
core from registers, and x from shared memory."""

import triton
import triton.language as tl

from engine.kernels.w4.dequantize import LIFT, dequantize, load_table
from engine.kernels.w4.tiles import (
    activated,
    add_product,
    by_warp,
    load_groups,
    load_words,
    store_tile,
    tile_rows,
    weight_rows,
)


@triton.jit(do_not_specialize=["M"])
def gemm_kernel(
    x_ptr, codes_ptr, scales_ptr, offsets_ptr, supers_ptr, codebook_ptr, bias_ptr, y_ptr,
    M, N, K, stride_xm,
    FORMAT: tl.constexpr, GATED: tl.constexpr, BLOCK_M: tl.constexpr, WARPS: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """x (M, K) -> y (M, N), or with GATED silu(gate) * up (M, N / 2); bias (N,) or None.

    With SPLITS > 1 y is (SPLITS, M, N) float32, a part of K each, for `reduce_kernel`. A program
    takes 16 * WARPS rows of W and BLOCK_M of x; those that share rows of W run together.
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    CHUNK: tl.constexpr = FORMAT.chunk
    ROWS: tl.constexpr = 16 * WARPS
    tiles_m = tl.cdiv(M, BLOCK_M)
    tile = tl.program_id(0) // tiles_m
    m = tl.program_id(0) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    warp, place = tile_rows(WARPS)
    rows, _ = weight_rows(tile * ROWS + warp * 16 + place, N, GATED)
    k = tl.arange(0, CHUNK)[:, None]
    x_ptr += tl.minimum(m, M - 1).to(tl.int64)[None, :] * stride_xm + k
    table = load_table(codebook_ptr, DTYPE) if codebook_ptr is not None else ()
    chunks = tl.cdiv(K, CHUNK)
    split = tl.program_id(1)
    begin = split * chunks // SPLITS
    same = warp * 0  # all warps take one chunk
    groups = load_groups(scales_ptr, offsets_ptr, supers_ptr, rows, same + begin, K, FORMAT)
    acc = tl.zeros((ROWS, BLOCK_M), tl.float32)
    for chunk in tl.range(begin, (split + 1) * chunks // SPLITS):
        words = load_words(codes_ptr, rows, same + chunk, K, FORMAT, "")
        if FORMAT.even:
            x = tl.load(x_ptr + chunk * CHUNK)
        else:
            x = tl.load(x_ptr + chunk * CHUNK, mask=chunk * CHUNK + k < K, other=0)
        w = by_warp(dequantize(words, groups, table, DTYPE, FORMAT), WARPS)
        following = same + tl.minimum(chunk + 1, chunks - 1)
        groups = load_groups(scales_ptr, offsets_ptr, supers_ptr, rows, following, K, FORMAT)
        acc = add_product(acc, tl.reshape(w, (ROWS, CHUNK)), x, FORMAT)
    if SPLITS == 1:
        outputs = N // 2 if GATED else N
        kind: tl.constexpr = "silu" if GATED else ""
        store_tile(
            acc / LIFT, bias_ptr, y_ptr, tile, m, M, N, outputs, None, None, None, GATED, kind, 0.0
        )  # fmt: skip
    else:
        rows, has = weight_rows(tile * ROWS + tl.arange(0, ROWS), N, GATED)
        at = (split * M + m).to(tl.int64)[None, :] * N + rows[:, None]
        tl.store(y_ptr + at, acc / LIFT, mask=has[:, None] & (m < M)[None, :])


@triton.jit(do_not_specialize=["M"])
def reduce_kernel(
    parts_ptr, bias_ptr, y_ptr, M, N, GATED: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """parts (SPLITS, M, N), bias (N,) -> y (M, N), with GATED silu(gate) * up (M, N / 2)."""
    outputs = N // 2 if GATED else N
    m = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    y = sum_parts(parts_ptr, bias_ptr, m, n, n < outputs, M, N, SPLITS)
    if GATED:
        up = sum_parts(parts_ptr, bias_ptr, m, n + outputs, n < outputs, M, N, SPLITS)
        y = activated(y, "silu") * up
    at = y_ptr + m.to(tl.int64) * outputs + n
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=n < outputs)


@triton.jit
def sum_parts(parts_ptr, bias_ptr, m, n, inside, M, N, SPLITS: tl.constexpr):
    total = tl.zeros(n.shape, tl.float32)
    for split in tl.static_range(SPLITS):
        at = parts_ptr + (split * M + m).to(tl.int64) * N + n
        total += tl.load(at, mask=inside, other=0).to(tl.float32)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + n, mask=inside, other=0).to(tl.float32)
    return total


@triton.jit
def dense_kernel(
    codes_ptr, scales_ptr, offsets_ptr, supers_ptr, codebook_ptr, w_ptr, first, N, K,
    FORMAT: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Rows first .. first + R of W (N, K) -> w (R, K); a program writes one chunk of 16 * WARPS."""
    DTYPE: tl.constexpr = w_ptr.dtype.element_ty
    CHUNK: tl.constexpr = FORMAT.chunk
    ROWS: tl.constexpr = 16 * WARPS
    tile = tl.program_id(0)
    rows, _ = weight_rows(tile * ROWS + tl.arange(0, ROWS), N - first, False)
    chunk = rows * 0 + tl.program_id(1)
    table = load_table(codebook_ptr, DTYPE) if codebook_ptr is not None else ()
    words = load_words(codes_ptr, first + rows, chunk, K, FORMAT, "")
    groups = load_groups(scales_ptr, offsets_ptr, supers_ptr, first + rows, chunk, K, FORMAT)
    w = dequantize(words, groups, table, DTYPE, FORMAT) / LIFT
    k = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)[None, :]
    at = w_ptr + rows.to(tl.int64)[:, None] * K + k
    tl.store(at, w.to(DTYPE), mask=k < K)
