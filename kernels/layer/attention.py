"""Decode attention in Triton: one token a sequence over keys and values in pages.

A launch normalises and rotates queries and keys, appends, and attends: the context of a sequence is
split between programs, of which the last to arrive adds up.
"""

import triton
import triton.language as tl

from engine.kernels.overlap import wait_for_previous
from engine.kernels.w4.tiles import capped


@triton.jit
def rotated_head(
    base_ptr, norm_ptr, bias_ptr, angles_ptr, heads, count, epsilon, whole_ptr, wholes,
    NORM: tl.constexpr, SCOPE: tl.constexpr, ROPE: tl.constexpr, E: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Heads (R,) of a token at `base_ptr`, normalised and rotated: (R, BLOCK_E) float32.

    SCOPE "head" normalises each over E; "all" over the `wholes` values at `whole_ptr`, all of the
    token's heads of the kind. Norm weights begin at the first head's.
    """
    e = tl.arange(0, BLOCK_E)[None, :]
    inside = (heads < count)[:, None] & (e < E)
    at = heads[:, None] * E + e
    x = tl.load(base_ptr + at, mask=inside, other=0).to(tl.float32)
    HALF: tl.constexpr = ROPE // 2
    rotates = e < ROPE
    partner = tl.where(rotates, tl.where(e < HALF, e + HALF, e - HALF), e)
    other = tl.load(base_ptr + heads[:, None] * E + partner, mask=inside, other=0).to(tl.float32)
    if SCOPE != "":
        if SCOPE == "head":
            mean = tl.sum(x, 1)[:, None] / E
            square = tl.sum(x * x, 1)[:, None] / E
            weight_at = e
            partner_at = partner
        else:
            square = tl.zeros((1, 1), tl.float32)
            mean = square
            k = tl.arange(0, 1024)[None, :]
            for first in tl.range(0, wholes, 1024):
                part = tl.load(whole_ptr + first + k, mask=first + k < wholes, other=0)
                part = part.to(tl.float32)
                square += tl.sum(part * part, 1)[:, None] / wholes
                mean += tl.sum(part, 1)[:, None] / wholes
            weight_at = at
            partner_at = heads[:, None] * E + partner
        weight = tl.load(norm_ptr + weight_at, mask=inside, other=0)
        other_weight = tl.load(norm_ptr + partner_at, mask=inside, other=0)
        if NORM == "layer":
            scale = tl.rsqrt(tl.maximum(square - mean * mean, 0) + epsilon)
            x = (x - mean) * scale * weight
            other = (other - mean) * scale * other_weight
            x += tl.load(bias_ptr + weight_at, mask=inside, other=0)
            other += tl.load(bias_ptr + partner_at, mask=inside, other=0)
        else:
            scale = tl.rsqrt(square + epsilon)
            x = x * scale * weight
            other = other * scale * other_weight
    if ROPE:
        angle = tl.where(rotates, e % HALF, 0)
        cos = tl.load(angles_ptr + angle)
        sin = tl.load(angles_ptr + HALF + angle)
        sin = tl.where(e < HALF, -sin, sin)
        x = tl.where(rotates, x * cos + other * sin, x)
    return tl.where(inside, x, 0)


@triton.jit(do_not_specialize=["slot"])
def attention_kernel(
    qkv_ptr, store_ptr, table_ptr, positions_ptr, live_ptr, angles_ptr, q_norm_ptr, q_bias_ptr,
    k_norm_ptr, k_bias_ptr, parts_ptr, counters_ptr, y_ptr,
    slot, table_width, epsilon, scale,
    SLOTS: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, E: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, PAGE: tl.constexpr, ROPE: tl.constexpr,
    NORM: tl.constexpr, SCOPE: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr,
    SPLITS: tl.constexpr, WIDE: tl.constexpr, OVERLAP: tl.constexpr = False,
):  # fmt: skip
    """qkv (B, (H + 2 G) E) -> y (B, H E), and the token's keys and values into their page.

    `store` is (pages, SLOTS, 2, G, PAGE, E), `table` (B, table_width) its pages, `positions` (B,),
    `live` (B,) which sequences run; the others write nothing. `angles` (C, ROPE) float32: cosines,
    then sines. With SPLITS > 1 `parts` is (B, G, SPLITS, BLOCK_R, BLOCK_E + 2) float32 and
    `counters` (B, G) int32 zeros, which are zeros again afterwards. WIDE: products in float32,
    where the kernel is interpreted. Grid (B, G, SPLITS).
    """
    wait_for_previous(OVERLAP)
    b = tl.program_id(0)
    group = tl.program_id(1)
    split = tl.program_id(2)
    if tl.load(live_ptr + b) == 0:
        return
    DTYPE: tl.constexpr = qkv_ptr.dtype.element_ty
    REPEATS: tl.constexpr = HEADS // KV_HEADS
    position = tl.load(positions_ptr + b)
    if ROPE:
        angles_ptr += position.to(tl.int64) * ROPE
    token = qkv_ptr + b.to(tl.int64) * ((HEADS + 2 * KV_HEADS) * E)
    key_at = token + (HEADS + group) * E
    r = tl.arange(0, BLOCK_R)
    e = tl.arange(0, BLOCK_E)
    one = tl.arange(0, 1)
    q_weights = q_norm_ptr
    q_biases = q_bias_ptr
    k_weights = k_norm_ptr
    k_biases = k_bias_ptr
    if SCOPE == "all":
        q_weights += group * REPEATS * E
        k_weights += group * E
        if q_bias_ptr is not None:
            q_biases += group * REPEATS * E
            k_biases += group * E
    q = rotated_head(
        token + group * REPEATS * E, q_weights, q_biases, angles_ptr, r, REPEATS, epsilon,
        token, HEADS * E, NORM, SCOPE, ROPE, E, BLOCK_E,
    ).to(DTYPE)  # fmt: skip
    first_page = 0
    if WINDOW:
        first_page = tl.maximum(position + 1 - WINDOW, 0) // PAGE
    pages = tl.cdiv(position, PAGE) - first_page
    begin = first_page + split * pages // SPLITS
    end = first_page + (split + 1) * pages // SPLITS
    top = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    acc = tl.zeros((BLOCK_R, BLOCK_E), tl.float32)
    PLANE: tl.constexpr = PAGE * E
    if split == 0:  # the token itself, which it alone appends
        key = rotated_head(
            key_at, k_weights, k_biases, angles_ptr, one, 1, epsilon,
            token + HEADS * E, KV_HEADS * E, NORM, SCOPE, ROPE, E, BLOCK_E,
        ).to(DTYPE)  # fmt: skip
        value = tl.load(key_at + KV_HEADS * E + e, mask=e < E, other=0)
        page = tl.load(table_ptr + b * table_width + position // PAGE).to(tl.int64)
        at = store_ptr + ((page * SLOTS + slot) * 2 * KV_HEADS + group) * PLANE
        at += position % PAGE * E
        tl.store(at + one[:, None] * E + e[None, :], key, mask=(e < E)[None, :])
        tl.store(at + KV_HEADS * PLANE + e, value, mask=e < E)
        top = capped(tl.sum(q.to(tl.float32) * key.to(tl.float32), 1) * scale, CAP)
        total += tl.exp(top - top)  # NaN where the score is none, which no page may correct
        acc += total[:, None] * value.to(tl.float32)[None, :]
    p = tl.arange(0, PAGE)
    for number in tl.range(begin, end):
        page = tl.load(table_ptr + b * table_width + number).to(tl.int64)
        at = store_ptr + ((page * SLOTS + slot) * 2 * KV_HEADS + group) * PLANE
        keys = tl.load(at + p[None, :] * E + e[:, None], mask=(e < E)[:, None], other=0)
        values = tl.load(
            at + KV_HEADS * PLANE + p[:, None] * E + e[None, :], mask=(e < E)[None, :], other=0
        )
        if WIDE:
            scores = tl.dot(q.to(tl.float32), keys.to(tl.float32))
        else:
            scores = tl.dot(q, keys)
        scores = capped(scores * scale, CAP)
        place = number * PAGE + p
        seen = place < position
        if WINDOW:
            seen = seen & (place > position - WINDOW)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        safe = tl.where(higher == float("-inf"), 0, higher)
        shrink = tl.exp(top - safe)
        shares = tl.exp(scores - safe[:, None])
        total = total * shrink + tl.sum(shares, 1)
        if WIDE:
            mixed = tl.dot(shares, values.to(tl.float32))
        else:
            mixed = tl.dot(shares.to(DTYPE), values)
        acc = acc * shrink[:, None] + mixed
        top = higher
    out = y_ptr + (b * HEADS + group * REPEATS).to(tl.int64) * E
    out = out + r[:, None] * E + e[None, :]
    inside = (r < REPEATS)[:, None] & (e < E)[None, :]
    if SPLITS == 1:
        tl.store(out, (acc / total[:, None]).to(DTYPE), mask=inside)
    else:
        STRIDE: tl.constexpr = BLOCK_R * (BLOCK_E + 2)
        own = b * KV_HEADS + group
        parts_ptr += own.to(tl.int64) * SPLITS * STRIDE
        mine = parts_ptr + split * STRIDE
        tl.store(mine + r[:, None] * BLOCK_E + e[None, :], acc)
        tl.store(mine + BLOCK_R * BLOCK_E + r, top)
        tl.store(mine + BLOCK_R * (BLOCK_E + 1) + r, total)
        tl.debug_barrier()  # every thread's part is written before the program says that it is
        if tl.atomic_add(counters_ptr + own, 1) == SPLITS - 1:
            joined = tl.full((BLOCK_R,), float("-inf"), tl.float32)
            for other in tl.range(0, SPLITS):
                theirs = parts_ptr + other * STRIDE + BLOCK_R * BLOCK_E + r
                joined = tl.maximum(joined, tl.load(theirs, cache_modifier=".cg"))
            total = tl.zeros((BLOCK_R,), tl.float32)
            acc = tl.zeros((BLOCK_R, BLOCK_E), tl.float32)
            for other in tl.range(0, SPLITS):
                theirs = parts_ptr + other * STRIDE
                top = tl.load(theirs + BLOCK_R * BLOCK_E + r, cache_modifier=".cg")
                weight = tl.exp(top - joined)
                part = tl.load(theirs + BLOCK_R * (BLOCK_E + 1) + r, cache_modifier=".cg")
                total += weight * part
                part = theirs + r[:, None] * BLOCK_E + e[None, :]
                acc += weight[:, None] * tl.load(part, cache_modifier=".cg")
            tl.store(out, (acc / total[:, None]).to(DTYPE), mask=inside)
            tl.store(counters_ptr + own, 0)
