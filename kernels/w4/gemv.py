"""Few rows of x times a matrix, bound by the reading of W alone.

A program takes a slice of K, whose x it stages in registers once, and goes down a range of rows of
W, 16 for every warp at a time.

A slice's sums go to a scratch buffer; of the programs of a range the last to arrive adds them up.

What a decoder does to x before it multiplies, and to y after, is part of the launch: see
kernels/layer/README.md.
"""

import triton
import triton.language as tl

from engine.kernels.layer.stream import known_means, load_x, means, moments
from engine.kernels.overlap import wait_for_previous
from engine.kernels.w4.dequantize import LIFT, dequantize, load_table
from engine.kernels.w4.tiles import (
    add_product,
    by_warp,
    group_of,
    load_groups,
    load_words,
    store_tile,
    tile_rows,
    weight_rows,
)

PARTS_AT_ONCE = tl.constexpr(4)  # loads in flight where parts are added up


@triton.jit
def load_plain(w_ptr, rows, chunk, K, FORMAT: tl.constexpr):
    """(R, CHUNK) weights that are not quantized: chunk (R,) of rows (R,)."""
    k = chunk[:, None] * FORMAT.chunk + tl.arange(0, FORMAT.chunk)[None, :]
    at = w_ptr + rows.to(tl.int64)[:, None] * K + k
    return tl.load(at, mask=k < K, other=0, eviction_policy="evict_first")


@triton.jit
def load_scales(
    scales_ptr, offsets_ptr, rows, first, last, K, CHUNKS: tl.constexpr, FORMAT: tl.constexpr
):
    """For rows (WARPS, 16) scale and offset of their chunks `first` and on, as stored: a tuple of
    CHUNKS pairs; what the scheme lacks repeats the scale."""
    found: tl.tuple = ()
    for c in tl.static_range(CHUNKS):
        at = group_of(rows, tl.minimum(first + c, last), K, FORMAT)
        scale = tl.load(scales_ptr + at)
        offset = scale
        if offsets_ptr is not None:
            offset = tl.load(offsets_ptr + at)
        found = found + ((scale, offset),)
    return found


@triton.jit
def add_whole(acc, w, x, x_sum, scales, FORMAT: tl.constexpr):
    """acc (WARPS, 16, M) + w @ x, scaled in float32 after the product: w (WARPS, 16, CHUNK) codes
    of one group a row, `x_sum` (WARPS, 1, M) what a minimum or zero point meets."""
    product = add_product(tl.zeros(acc.shape, tl.float32), w, x, FORMAT)
    offset = scales[1].to(tl.float32)[:, :, None]
    if FORMAT.scheme == "zero":
        product -= x_sum * offset
    acc += product * scales[0].to(tl.float32)[:, :, None]
    if FORMAT.scheme == "minimum":
        acc += x_sum * offset
    return acc


@triton.jit
def sum_parts(parts_ptr, position, m, M, stride, count):
    """What `position` (R,) and m (BLOCK_M,) have in `count` parts (M, `stride`) together."""
    at = parts_ptr + m[None, :] * stride + position[:, None]
    total = tl.zeros(at.shape, tl.float32)
    none = position * 0
    for first in tl.range(0, count, PARTS_AT_ONCE):
        for i in tl.static_range(PARTS_AT_ONCE):
            inside = (m < M)[None, :] & (none + first + i < count)[:, None]
            total += tl.load(at, mask=inside, other=0, cache_modifier=".cg")
            at += M * stride
    return total


@triton.jit(do_not_specialize=["M", "tiles", "ranges"])
def gemv_kernel(
    x_ptr, codes_ptr, scales_ptr, offsets_ptr, supers_ptr, codebook_ptr, bias_ptr, y_ptr,
    parts_ptr, counters_ptr,
    M, N, K, stride_xm, stride_ym, tiles,
    FORMAT: tl.constexpr, DTYPE: tl.constexpr, GATED: tl.constexpr, BLOCK_M: tl.constexpr,
    WARPS: tl.constexpr, CHUNKS: tl.constexpr,
    perm_ptr=None, delta_ptr=None, post_ptr=None, stream_ptr=None, norm_ptr=None,
    norm_bias_ptr=None, gate_ptr=None, add_ptr=None, live_ptr=None, sums_ptr=None,
    out_sums_ptr=None, ranges=0, epsilon=0.0,
    NORM: tl.constexpr = "", ACTIVATION: tl.constexpr = "", CAP: tl.constexpr = 0.0,
    OVERLAP: tl.constexpr = False,
):  # fmt: skip
    """x (M, K) -> y (M, N), or with GATED activated(gate) * up (M, N / 2). Grid (ranges, slices,
    blocks of BLOCK_M rows of x).

    A range is `tiles` tiles of 16 * WARPS rows of W (GATED half of them gate, half up), a slice
    CHUNKS chunks of K. `parts` is (slices, M, rows of all ranges) float32; `counters`, one for
    every range and block of x, are zeros, which they are again afterwards.

    Before: column k of W meets x[perm[k]]. x, in DTYPE or float32, becomes x + RMSNorm(delta) with
    weights `post`, which goes to `stream` (M, K) float32; then NORM of it, "rms" or "layer"; then
    DTYPE. `sums` (`ranges`, 2, M), where given, are the sums over x's squares and values, in parts.
    After: see `store_tile`; `out_sums` (the grid's ranges, 2, M) gets these sums over y.
    """
    wait_for_previous(OVERLAP)
    CHUNK: tl.constexpr = FORMAT.chunk
    PLAIN: tl.constexpr = FORMAT.scheme == "plain"
    ROWS: tl.constexpr = 16 * WARPS
    every = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    m = every[None, :]
    mean = tl.zeros((BLOCK_M,), tl.float32)
    scale = mean
    post_scale = mean
    if delta_ptr is not None:
        square, mean = moments(delta_ptr, None, None, mean, every, M, K, stride_xm, BLOCK_M)
        post_scale = means(square, mean, epsilon, "rms")[1]  # `_` is of another type below
    if NORM != "":
        if sums_ptr is not None:
            square, mean = known_means(sums_ptr, ranges, every, M, K, BLOCK_M)
        else:
            square, mean = moments(
                x_ptr, delta_ptr, post_ptr, post_scale, every, M, K, stride_xm, BLOCK_M
            )
        mean, scale = means(square, mean, epsilon, NORM)
    first = tl.program_id(1) * CHUNKS  # chunk
    xs: tl.tuple = ()  # (WARPS, CHUNK, BLOCK_M) for each chunk: every warp has its own
    x_sums: tl.tuple = ()  # (WARPS, 1, BLOCK_M)
    for c in tl.static_range(CHUNKS):
        k = (first + c) * CHUNK + tl.arange(0, CHUNK)[:, None]
        x = load_x(
            x_ptr, perm_ptr, delta_ptr, post_ptr, norm_ptr, norm_bias_ptr, stream_ptr,
            tl.program_id(0) == 0, k, m, (m < M) & (k < K), K, stride_xm, post_scale, mean, scale,
            NORM, DTYPE,
        )  # fmt: skip
        x_sum = tl.sum(x.to(tl.float32), 0)[None, None, :]
        xs = xs + (tl.broadcast_to(x[None, :, :], (WARPS, CHUNK, BLOCK_M)),)
        x_sums = x_sums + (tl.broadcast_to(x_sum, (WARPS, 1, BLOCK_M)),)
    # Places of a tile's rows, as they are loaded and as they are multiplied.
    warp, place = tile_rows(WARPS)
    place = warp * 16 + place
    places = tl.arange(0, WARPS)[:, None] * 16 + tl.arange(0, 16)[None, :]
    last = tl.cdiv(K, CHUNK) - 1
    stride = tl.num_programs(0) * tiles * ROWS
    part_ptr = parts_ptr + (tl.program_id(1).to(tl.int64) * M + m[None, :, :]) * stride
    table = load_table(codebook_ptr, DTYPE) if codebook_ptr is not None else ()
    start = tl.program_id(0) * tiles
    scales: tl.tuple = ()
    if FORMAT.whole:
        rows, _ = weight_rows(start * ROWS + places, N, GATED)
        scales = load_scales(scales_ptr, offsets_ptr, rows, first, last, K, CHUNKS, FORMAT)
    for tile in tl.range(start, start + tiles):
        rows, _ = weight_rows(tile * ROWS + place, N, GATED)
        acc = tl.zeros((WARPS, 16, BLOCK_M), tl.float32)
        for c in tl.static_range(CHUNKS):
            chunk = rows * 0 + tl.minimum(first + c, last)
            if PLAIN:
                w = load_plain(codes_ptr, rows, chunk, K, FORMAT)
                acc = add_product(acc, by_warp(w, WARPS), xs[c], FORMAT)
            else:
                words = load_words(codes_ptr, rows, chunk, K, FORMAT, "evict_first")  # read once
                if FORMAT.whole:
                    w = by_warp(dequantize(words, None, table, DTYPE, FORMAT), WARPS)
                    acc = add_whole(acc, w, xs[c], x_sums[c], scales[c], FORMAT)
                else:
                    groups = load_groups(
                        scales_ptr, offsets_ptr, supers_ptr, rows, chunk, K, FORMAT
                    )
                    w = by_warp(dequantize(words, groups, table, DTYPE, FORMAT), WARPS)
                    acc = add_product(acc, w, xs[c], FORMAT)
        if FORMAT.whole:  # a tile ahead: Triton's pipeline leaves loads of 2 bytes where they are
            rows, _ = weight_rows(tile * ROWS + ROWS + places, N, GATED)
            scales = load_scales(scales_ptr, offsets_ptr, rows, first, last, K, CHUNKS, FORMAT)
        elif not PLAIN:
            acc /= LIFT
        tl.store(part_ptr + (tile * ROWS + places)[:, :, None], acc, mask=(m < M)[None, :, :])
    tl.debug_barrier()  # every thread's part is written before the program says that it is
    slices = tl.num_programs(1)
    counter = counters_ptr + tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    if tl.atomic_add(counter, 1) != slices - 1:
        return
    tl.store(counter, 0)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for tile in tl.range(start, start + tiles):
        position = tile * ROWS + tl.arange(0, ROWS)
        acc = sum_parts(parts_ptr, position, every, M, stride, slices)
        y = store_tile(
            acc, bias_ptr, y_ptr, tile, every, M, N, stride_ym, gate_ptr, add_ptr, live_ptr, GATED,
            ACTIVATION, CAP,
        )  # fmt: skip
        squares += tl.sum(y * y, 0)
        total += tl.sum(y, 0)
    if out_sums_ptr is not None:
        at = out_sums_ptr + tl.program_id(0) * 2 * M + every
        tl.store(at, squares, mask=every < M)
        tl.store(at + M, total, mask=every < M)
