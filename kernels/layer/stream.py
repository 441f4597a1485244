"""The residual stream in Triton: what a matmul does to x first, embedding, choice."""

import triton
import triton.language as tl

from engine.kernels.overlap import wait_for_previous
from engine.kernels.w4.dequantize import LIFT, dequantize, load_table
from engine.kernels.w4.tiles import load_groups, load_words

BLOCK_K = tl.constexpr(256)  # of a pass over rows of x
BLOCK_R = tl.constexpr(32)  # of a pass over sums in parts


@triton.jit
def means(square, mean, epsilon, NORM: tl.constexpr):
    """What to take from values and to multiply them by: `square` and `mean` are sums over K / K."""
    if NORM == "layer":
        scale = tl.rsqrt(tl.maximum(square - mean * mean, 0) + epsilon)
    else:
        scale = tl.rsqrt(square + epsilon)
        mean = mean * 0
    return mean, scale


@triton.jit
def moments(x_ptr, delta_ptr, post_ptr, post_scale, m, M, K, stride_xm, BLOCK_M: tl.constexpr):
    """Means of squares and of values of rows m (BLOCK_M,) of x, or of x + post * delta."""
    k = tl.arange(0, BLOCK_K)[None, :]
    row = m.to(tl.int64)[:, None] * stride_xm
    square = tl.zeros((BLOCK_M,), tl.float32)
    mean = tl.zeros((BLOCK_M,), tl.float32)
    for first in tl.range(0, K, BLOCK_K):
        at = row + first + k
        inside = (m < M)[:, None] & (first + k < K)
        x = tl.load(x_ptr + at, mask=inside, other=0).to(tl.float32)
        if delta_ptr is not None:
            post = tl.load(post_ptr + first + k, mask=first + k < K, other=0)
            x += tl.load(delta_ptr + at, mask=inside, other=0) * post_scale[:, None] * post
        square += tl.sum(x * x, 1)
        mean += tl.sum(x, 1)
    return square / K, mean / K


@triton.jit
def known_means(sums_ptr, ranges, m, M, K, BLOCK_M: tl.constexpr):
    """The same of sums (`ranges`, 2, M) that the launch before left."""
    r = tl.arange(0, BLOCK_R)[:, None]
    square = tl.zeros((BLOCK_M,), tl.float32)
    mean = tl.zeros((BLOCK_M,), tl.float32)
    for first in tl.range(0, ranges, BLOCK_R):
        at = sums_ptr + (first + r) * 2 * M + m[None, :]
        inside = (first + r < ranges) & (m < M)[None, :]
        square += tl.sum(tl.load(at, mask=inside, other=0), 0)
        mean += tl.sum(tl.load(at + M, mask=inside, other=0), 0)
    return square / K, mean / K


@triton.jit
def load_x(
    x_ptr, perm_ptr, delta_ptr, post_ptr, norm_ptr, norm_bias_ptr, stream_ptr, writes, k, m, inside,
    K, stride_xm, post_scale, mean, scale, NORM: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Columns k (R, 1) of rows m (1, BLOCK_M) of x as W reads them, 0 where they are not `inside`.

    Where `writes`, x with what delta adds goes to `stream_ptr`.
    """
    column = k
    if perm_ptr is not None:
        column = tl.load(perm_ptr + k, mask=k < K, other=0)
    at = m.to(tl.int64) * stride_xm + column
    x = tl.load(x_ptr + at, mask=inside, other=0)
    if delta_ptr is not None:
        delta = tl.load(delta_ptr + at, mask=inside, other=0)
        post = tl.load(post_ptr + column, mask=k < K, other=0)
        x = x.to(tl.float32) + delta * post_scale[None, :] * post
        if writes:
            tl.store(stream_ptr + at, x, mask=inside)
    if NORM != "":
        weight = tl.load(norm_ptr + column, mask=k < K, other=0)
        x = (x.to(tl.float32) - mean[None, :]) * scale[None, :] * weight
        if norm_bias_ptr is not None:
            x += tl.load(norm_bias_ptr + column, mask=k < K, other=0)
    return tl.where(inside, x.to(DTYPE), 0)


@triton.jit
def store_sums(sums_ptr, squares, total):
    """A program's, of grid (B, programs of a row)."""
    batch = tl.num_programs(0)
    at = sums_ptr + tl.program_id(1) * 2 * batch + tl.program_id(0)
    tl.store(at, squares)
    tl.store(at + batch, total)


@triton.jit
def embed_kernel(
    tokens_ptr, codes_ptr, scales_ptr, offsets_ptr, supers_ptr, codebook_ptr, perm_ptr, x_ptr,
    sums_ptr, factor, D, FORMAT: tl.constexpr, DTYPE: tl.constexpr, OVERLAP: tl.constexpr = False,
):  # fmt: skip
    """Rows `tokens` (B,) of a packed matrix (V, D) times `factor` -> x (B, D) float32, and its sums
    for norms (programs of a row, 2, B).

    A program takes 16 chunks. Of a negative token row 0 is read.
    """
    wait_for_previous(OVERLAP)
    CHUNK: tl.constexpr = FORMAT.chunk
    b = tl.program_id(0)
    token = tl.maximum(tl.load(tokens_ptr + b), 0)
    chunk = tl.program_id(1) * 16 + tl.arange(0, 16)
    last = tl.cdiv(D, CHUNK) - 1
    rows = token + chunk * 0
    table = load_table(codebook_ptr, DTYPE) if codebook_ptr is not None else ()
    held = tl.minimum(chunk, last)
    words = load_words(codes_ptr, rows, held, D, FORMAT, "")
    groups = load_groups(scales_ptr, offsets_ptr, supers_ptr, rows, held, D, FORMAT)
    w = dequantize(words, groups, table, DTYPE, FORMAT).to(tl.float32) / LIFT
    d = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    at = d
    if perm_ptr is not None:
        at = tl.load(perm_ptr + d, mask=d < D, other=0)
    x = tl.where(d < D, w * factor, 0)
    tl.store(x_ptr + b.to(tl.int64) * D + at, x, mask=d < D)
    store_sums(sums_ptr, tl.sum(tl.sum(x * x, 1), 0), tl.sum(tl.sum(x, 1), 0))


@triton.jit
def embed_plain_kernel(
    tokens_ptr, table_ptr, x_ptr, sums_ptr, factor, D, BLOCK_D: tl.constexpr,
    OVERLAP: tl.constexpr = False,
):  # fmt: skip
    """The same of a matrix (V, D) of floats; a program takes BLOCK_D columns."""
    wait_for_previous(OVERLAP)
    b = tl.program_id(0).to(tl.int64)
    token = tl.maximum(tl.load(tokens_ptr + b), 0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    x = tl.load(table_ptr + token * D + d, mask=d < D, other=0).to(tl.float32) * factor
    tl.store(x_ptr + b * D + d, x, mask=d < D)
    store_sums(sums_ptr, tl.sum(x * x, 0), tl.sum(x, 0))


@triton.jit
def choose_kernel(logits_ptr, ids_ptr, V, BLOCK_V: tl.constexpr, OVERLAP: tl.constexpr = False):
    """logits (B, V) float32 -> ids (B,) int32: the lowest of the largest logit, -1 where it is
    not finite or one is NaN. A program takes a row.
    """
    wait_for_previous(OVERLAP)
    b = tl.program_id(0).to(tl.int64)
    v = tl.arange(0, BLOCK_V)
    best = tl.full((BLOCK_V,), float("-inf"), tl.float32)
    where = tl.zeros((BLOCK_V,), tl.int32)
    wrong = tl.zeros((BLOCK_V,), tl.int32)
    for first in tl.range(0, V, BLOCK_V):
        x = tl.load(logits_ptr + b * V + first + v, mask=first + v < V, other=float("-inf"))
        wrong = tl.where(x != x, 1, wrong)
        where = tl.where(x > best, first + v, where)
        best = tl.maximum(best, x)
    top = tl.max(best, 0)
    id = tl.min(tl.where(best == top, where, V), 0)
    finite = (tl.max(wrong, 0) == 0) & (tl.abs(top) < float("inf"))
    tl.store(ids_ptr + b, tl.where(finite, id, -1))
