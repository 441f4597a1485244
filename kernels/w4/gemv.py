"""Few rows of x times a matrix: the warps of a program share 16 rows of W, take turns along K, and
add up at the end. 16 rows a program keep the whole GPU reading, small matrices too.

What a decoder does to x before it multiplies, and to y after, is part of the launch: see
kernels/layer/README.md.
"""

import triton
import triton.language as tl

from engine.kernels.layer.stream import load_x, means, moments
from engine.kernels.w4.dequantize import LIFT, dequantize, load_table
from engine.kernels.w4.tiles import (
    add_product,
    by_warp,
    load_groups,
    load_words,
    store_tile,
    tile_rows,
    weight_rows,
)


@triton.jit
def load_plain(w_ptr, rows, chunk, K, FORMAT: tl.constexpr):
    """(R, CHUNK) weights that are not quantized: chunk (R,) of rows (R,)."""
    k = chunk[:, None] * FORMAT.chunk + tl.arange(0, FORMAT.chunk)[None, :]
    at = w_ptr + rows.to(tl.int64)[:, None] * K + k
    return tl.load(at, mask=k < K, other=0, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["M"])
def gemv_kernel(
    x_ptr, codes_ptr, scales_ptr, offsets_ptr, supers_ptr, codebook_ptr, bias_ptr, y_ptr,
    M, N, K, stride_xm, stride_ym,
    FORMAT: tl.constexpr, DTYPE: tl.constexpr, GATED: tl.constexpr, BLOCK_M: tl.constexpr,
    WARPS: tl.constexpr,
    perm_ptr=None, delta_ptr=None, post_ptr=None, stream_ptr=None, norm_ptr=None,
    norm_bias_ptr=None, gate_ptr=None, add_ptr=None, live_ptr=None, epsilon=0.0,
    NORM: tl.constexpr = "", ACTIVATION: tl.constexpr = "", CAP: tl.constexpr = 0.0,
):  # fmt: skip
    """x (M, K) -> y (M, N), or with GATED activated(gate) * up (M, N / 2).

    A program takes 16 rows of W, GATED 8 of gate and the same of up, and BLOCK_M of x. A step takes
    WARPS chunks.

    Before: column k of W meets x[perm[k]]. x, in DTYPE or float32, becomes x + RMSNorm(delta) with
    weights `post`, which goes to `stream` (M, K) float32; then NORM of it, "rms" or "layer"; then
    DTYPE. After: see `store_tile`.
    """
    CHUNK: tl.constexpr = FORMAT.chunk
    PLAIN: tl.constexpr = FORMAT.scheme == "plain"
    tile = tl.program_id(0)
    warp, place = tile_rows(WARPS)
    rows, _ = weight_rows(tile, place, N, 16, GATED)
    every = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    m = every[None, None, :]
    k = tl.arange(0, WARPS)[:, None, None] * CHUNK + tl.arange(0, CHUNK)[None, :, None]
    mean = tl.zeros((BLOCK_M,), tl.float32)
    scale = mean
    post_scale = mean
    if delta_ptr is not None:
        square, mean = moments(
            delta_ptr, None, None, mean, None, False, every, M, K, stride_xm, BLOCK_M
        )
        _, post_scale = means(square, mean, epsilon, "rms")
    if NORM != "" or delta_ptr is not None:
        square, mean = moments(
            x_ptr, delta_ptr, post_ptr, post_scale, stream_ptr, tile == 0, every, M, K, stride_xm,
            BLOCK_M,
        )  # fmt: skip
        mean, scale = means(square, mean, epsilon, NORM)
    table = load_table(codebook_ptr, DTYPE) if codebook_ptr is not None else ()
    last = tl.cdiv(K, CHUNK) - 1
    chunk = tl.minimum(warp, last)
    if not PLAIN:
        groups = load_groups(scales_ptr, offsets_ptr, supers_ptr, rows, chunk, K, FORMAT)
    acc = tl.zeros((WARPS, 16, BLOCK_M), tl.float32)
    for first in tl.range(0, last + 1, WARPS):
        chunk = tl.minimum(first + warp, last)
        if PLAIN:
            w = load_plain(codes_ptr, rows, chunk, K, FORMAT)
        else:
            words = load_words(codes_ptr, rows, chunk, K, FORMAT, "evict_first")  # read once
        inside = m < M if FORMAT.even else (m < M) & (first * CHUNK + k < K)
        x = load_x(
            x_ptr, perm_ptr, delta_ptr, post_ptr, norm_ptr, norm_bias_ptr, first * CHUNK + k, m,
            inside, K, stride_xm, post_scale, mean, scale, NORM, DTYPE,
        )  # fmt: skip
        if not PLAIN:
            w = dequantize(words, groups, table, DTYPE, FORMAT)
            # A step ahead: Triton's pipeline leaves loads of less than 4 bytes where they are.
            chunk = tl.minimum(first + WARPS + warp, last)
            groups = load_groups(scales_ptr, offsets_ptr, supers_ptr, rows, chunk, K, FORMAT)
        acc = add_product(acc, by_warp(w, WARPS), x, FORMAT)
    y = tl.sum(acc, 0)
    if PLAIN:
        y *= LIFT
    store_tile(
        y, bias_ptr, y_ptr, tile, every, M, N, stride_ym, gate_ptr, add_ptr, live_ptr, GATED,
        ACTIVATION, CAP,
    )  # fmt: skip
