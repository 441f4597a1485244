"""Few rows of x times a packed matrix: the warps of a program share 16 rows of W, take turns along
K, and add up at the end. 16 rows a program keep the whole GPU reading, small matrices too."""

import triton
import triton.language as tl

from engine.kernels.w4.dequantize import dequantize, load_table
from engine.kernels.w4.tiles import (
    add_product,
    by_warp,
    load_groups,
    load_words,
    store_tile,
    tile_rows,
    weight_rows,
)


@triton.jit(do_not_specialize=["M"])
def gemv_kernel(
    x_ptr, codes_ptr, scales_ptr, offsets_ptr, supers_ptr, codebook_ptr, bias_ptr, y_ptr,
    M, N, K, stride_xm,
    FORMAT: tl.constexpr, GATED: tl.constexpr, BLOCK_M: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """x (M <= BLOCK_M, K) -> y (M, N), or with GATED silu(gate) * up (M, N / 2); bias (N,) or None.

    A program takes 16 rows of W, GATED 8 of gate and the same of up. A step takes WARPS chunks.
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    CHUNK: tl.constexpr = FORMAT.chunk
    tile = tl.program_id(0)
    warp, place = tile_rows(WARPS)
    rows, _ = weight_rows(tile, place, N, 16, GATED)
    m = tl.arange(0, BLOCK_M)[None, None, :]
    k = tl.arange(0, WARPS)[:, None, None] * CHUNK + tl.arange(0, CHUNK)[None, :, None]
    x_ptr += m * stride_xm + k
    table = load_table(codebook_ptr, DTYPE) if codebook_ptr is not None else ()
    last = tl.cdiv(K, CHUNK) - 1
    chunk = tl.minimum(warp, last)
    groups = load_groups(scales_ptr, offsets_ptr, supers_ptr, rows, chunk, K, FORMAT)
    acc = tl.zeros((WARPS, 16, BLOCK_M), tl.float32)
    for first in tl.range(0, last + 1, WARPS):
        chunk = tl.minimum(first + warp, last)
        words = load_words(codes_ptr, rows, chunk, K, FORMAT, "evict_first")  # read once
        inside = m < M if FORMAT.even else (m < M) & (first * CHUNK + k < K)
        x = tl.load(x_ptr + first * CHUNK, mask=inside, other=0)
        w = dequantize(words, groups, table, DTYPE, FORMAT)
        # A step ahead, because Triton's pipeline leaves loads of less than 4 bytes where they are.
        chunk = tl.minimum(first + WARPS + warp, last)
        groups = load_groups(scales_ptr, offsets_ptr, supers_ptr, rows, chunk, K, FORMAT)
        acc = add_product(acc, by_warp(w, WARPS), x, FORMAT)
    store_tile(tl.sum(acc, 0), bias_ptr, y_ptr, tile, tl.arange(0, BLOCK_M), M, N, GATED)
