"""What tiles of the Triton kernels read and write: rows of W, chunks of codes, groups, outputs."""

import triton
import triton.language as tl


@triton.jit
def tile_rows(WARPS: tl.constexpr):
    """Of 16 * WARPS rows as loaded: the warp of each, and its place among the warp's 16.

    Triton deals 8 rows to each warp before it comes round; a tensor core takes 16 from one warp.
    """
    row = tl.arange(0, 16 * WARPS)
    return row // 8 % WARPS, row // (8 * WARPS) * 8 + row % 8


@triton.jit
def by_warp(tile, WARPS: tl.constexpr):
    """(16 * WARPS, CHUNK) as loaded -> (WARPS, 16, CHUNK)."""
    CHUNK: tl.constexpr = tile.shape[1]
    tile = tl.permute(tl.reshape(tile, (2, WARPS, 8, CHUNK)), (1, 0, 2, 3))
    return tl.reshape(tile, (WARPS, 16, CHUNK))


@triton.jit
def load_words(codes_ptr, rows, chunk, K, FORMAT: tl.constexpr, EVICT: tl.constexpr):
    """(R, 16) int32: chunk (R,) of rows (R,)."""
    at = rows.to(tl.int64) * tl.cdiv(K, FORMAT.chunk) + chunk
    at = codes_ptr + at[:, None] * 16 + tl.arange(0, 16)[None, :]
    return tl.load(at, eviction_policy=EVICT)


@triton.jit
def group_at(rows, chunk, K, HALF: tl.constexpr, FORMAT: tl.constexpr):
    """Where the group of each word's first or second HALF lies among (N, G): (R, 16), or (R, 1)
    where a chunk has one."""
    rows = rows.to(tl.int64)[:, None]
    chunk = chunk[:, None]
    CHUNK: tl.constexpr = FORMAT.chunk
    GROUP: tl.constexpr = FORMAT.group
    if GROUP == 0:
        at = rows
    elif GROUP >= CHUNK:
        at = rows * tl.cdiv(K, GROUP) + chunk // (GROUP // CHUNK)
    else:
        word = tl.arange(0, 16)[None, :] % 4
        groups = 2 * word + HALF if FORMAT.halves else word // (4 * GROUP // CHUNK)
        if FORMAT.even:
            at = (rows * (K // CHUNK) + chunk) * (CHUNK // GROUP) + groups
        else:
            last = tl.cdiv(K, GROUP) - 1
            at = rows * (last + 1) + tl.minimum(chunk * (CHUNK // GROUP) + groups, last)
    return at


@triton.jit
def group_of(rows, chunk, K, FORMAT: tl.constexpr):
    """Where the group of a chunk lies among (N, G), of rows and chunk of one shape, in formats that
    are `whole`."""
    at = rows.to(tl.int64)
    if FORMAT.group != 0:
        at = at * tl.cdiv(K, FORMAT.group) + chunk // (FORMAT.group // FORMAT.chunk)
    return at


@triton.jit
def load_half(
    scales_ptr, offsets_ptr, supers_ptr, rows, chunk, K, HALF: tl.constexpr, FORMAT: tl.constexpr
):
    """(scale, offset, d, dmin) as stored; what the scheme lacks repeats the scale."""
    at = group_at(rows, chunk, K, HALF, FORMAT)
    scale = tl.load(scales_ptr + at)
    offset = scale
    d = scale
    dmin = scale
    if offsets_ptr is not None:
        offset = tl.load(offsets_ptr + at)
    if supers_ptr is not None:  # of 2 chunks
        pair = supers_ptr + (rows.to(tl.int64) * tl.cdiv(K, 256) + chunk // 2)[:, None] * 2
        d = tl.load(pair)
        dmin = tl.load(pair + 1)
    return scale, offset, d, dmin


@triton.jit
def load_groups(scales_ptr, offsets_ptr, supers_ptr, rows, chunk, K, FORMAT: tl.constexpr):
    """Those of the words' first halves, and of the second."""
    first = load_half(scales_ptr, offsets_ptr, supers_ptr, rows, chunk, K, 0, FORMAT)
    second = first
    if FORMAT.halves:
        second = load_half(scales_ptr, offsets_ptr, supers_ptr, rows, chunk, K, 1, FORMAT)
    return first, second


@triton.jit
def add_product(acc, w, x, FORMAT: tl.constexpr):
    """acc + w @ x."""
    if not FORMAT.asm:  # the interpreter multiplies bfloat16 as if it were an integer
        w = w.to(tl.float32)
        x = x.to(tl.float32)
    return tl.dot(w, x, acc)


@triton.jit
def weight_rows(position, N, GATED: tl.constexpr):
    """The rows of W at positions 0, 1, .. of the order that tiles take them in, and whether W has
    them.

    GATED that order has 8 rows of gate, the same 8 of up, and so on; rows that W lacks repeat its
    last.
    """
    if GATED:
        row = position // 16 * 8 + position % 8
        inside = row < N // 2
        row = tl.minimum(row, N // 2 - 1) + position // 8 % 2 * (N // 2)
    else:
        inside = position < N
        row = tl.minimum(position, N - 1)
    return row, inside


@triton.jit
def add_bias(acc, bias_ptr, rows):
    """acc (ROWS, M), a row of W each."""
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + rows).to(tl.float32)[:, None]
    return acc


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """x float32 through one of kernels/layer/reference.py's ACTIVATIONS."""
    if ACTIVATION == "silu":
        y = x / (1 + tl.exp(-x))
    elif ACTIVATION == "gelu_tanh":  # 1 + tanh(u) = 2 / (1 + exp(-2 u))
        y = x / (1 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    else:
        y = tl.where(x < 0, 0.0, x)  # NaN stays
    return y


@triton.jit
def capped(scores, CAP: tl.constexpr):
    """CAP * tanh(scores / CAP); as they are where CAP is 0."""
    if CAP != 0:
        scores = CAP - 2 * CAP / (1 + tl.exp(scores * (2 / CAP)))
    return scores


@triton.jit
def gate_up(acc, ACTIVATION: tl.constexpr):
    """(ROWS, M) of a GATED tile -> activated(gate) * up, (ROWS / 2, M)."""
    ROWS: tl.constexpr = acc.shape[0]
    M: tl.constexpr = acc.shape[1]
    acc = tl.permute(tl.reshape(acc, (ROWS // 16, 2, 8, M)), (0, 2, 3, 1))
    gate, up = tl.split(tl.reshape(acc, (ROWS // 2, M, 2)))
    return activated(gate, ACTIVATION) * up


@triton.jit
def store_tile(
    acc, bias_ptr, y_ptr, tile, m, M, N, stride_ym, gate_ptr, add_ptr, live_ptr,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """acc (ROWS, BLOCK_M) of a tile -> rows m of y, `stride_ym` apart. Gives what it stored in
    float32, 0 elsewhere.

    In this order, each where it is given: bias, the gate that W holds or that `gate_ptr` does (as y
    lies), or else the activation alone, the cap, 0 for rows that are not `live`, and `add_ptr`
    (float32, as y lies, which may be y itself).
    """
    ROWS: tl.constexpr = acc.shape[0]
    rows, _ = weight_rows(tile * ROWS + tl.arange(0, ROWS), N, GATED)
    y = add_bias(acc, bias_ptr, rows)
    if GATED:
        y = gate_up(y, ACTIVATION)
        N = N // 2
    n = tile * y.shape[0] + tl.arange(0, y.shape[0])
    inside = (n < N)[:, None] & (m < M)[None, :]
    at = m.to(tl.int64)[None, :] * stride_ym + n[:, None]
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + at, mask=inside, other=0).to(tl.float32)
        y = activated(gate, ACTIVATION) * y
    elif ACTIVATION != "" and not GATED:
        y = activated(y, ACTIVATION)
    y = capped(y, CAP)
    if live_ptr is not None:
        y = tl.where(tl.load(live_ptr + m, mask=m < M, other=0)[None, :] != 0, y, 0)
    if add_ptr is not None:
        y += tl.load(add_ptr + at, mask=inside, other=0)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)
    return tl.where(inside, y, 0)
