"""The kernels of a decode step interpreted on a CPU, against kernels/layer/reference.py."""

from dataclasses import replace
from itertools import product

import pytest
import torch
import triton
import triton.language as tl
from support.close import assert_close
from support.packed import every_spec, random_packed
from support.w4_calls import scaled

from engine.kernels.layer import reference
from engine.kernels.layer.attention import attention_kernel
from engine.kernels.layer.stream import choose_kernel, embed_kernel
from engine.kernels.w4 import fused, launch
from engine.kernels.w4.dequantize import Format
from engine.kernels.w4.format import Packed, unpack
from engine.kernels.w4.gemv import gemv_kernel
from engine.kernels.w4.layout_gpu import to_gpu
from engine.kernels.w4.tiles import activated

pytestmark = pytest.mark.usefixtures("inside")
PAGE, SLOTS, WIDTH, EPSILON, SCALE = 16, 3, 5, 1e-5, 0.3
BOUND = 2e-3  # float16 in and out


def below(rng, limit: int, *shape: int):
    found = torch.randint(0, limit, shape, generator=rng)
    return found if shape else int(found)


@triton.jit
def activate_kernel(x_ptr, y_ptr, ACTIVATION: tl.constexpr):
    at = tl.arange(0, 16)
    tl.store(y_ptr + at, activated(tl.load(x_ptr + at), ACTIVATION))


@pytest.mark.parametrize("name", reference.ACTIVATIONS)
def test_activations(rng, name):
    """NaN stays one."""
    x, y = torch.randn(16, generator=rng) * 3, torch.zeros(16)
    x[:3] = torch.tensor([torch.nan, 0.0, -0.0])
    activate_kernel[(1,)](x, y, name)
    torch.testing.assert_close(y, reference.ACTIVATIONS[name](x), equal_nan=True)


def attended_alone(qkv, store, position: int, window: int, heads: int):
    """(1, heads * 16) of one token at `position`, whose heads share one of keys and values."""
    y = torch.zeros(1, heads * 16).half()
    attention_kernel[(1, 1, 1)](
        qkv, store, torch.arange(WIDTH).view(1, WIDTH).int(), torch.tensor([position]).int(),
        torch.ones(1).int(), None, None, None, None, None, torch.zeros(16 * 18),
        torch.zeros(1).int(), y, 0, WIDTH, EPSILON, SCALE, SLOTS=SLOTS, HEADS=heads, KV_HEADS=1,
        E=16, BLOCK_E=16, BLOCK_R=16, PAGE=PAGE, ROPE=0, NORM="rms", SCOPE="", WINDOW=window,
        CAP=0.0, SPLITS=1, WIDE=True,
    )  # fmt: skip
    return y


@pytest.mark.parametrize("wrong", ["query", "key"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(("position", "window"), [(0, 0), (PAGE, 1), (5, 0)])
def test_attention_hides_no_score_that_is_none(rng, wrong, value, position, window):
    """Also where no page is read, and a token attends to itself alone."""
    heads, groups, e = 2, 1, 16
    qkv = torch.randn(1, (heads + 2 * groups) * e, generator=rng).half()
    qkv[0, 0 if wrong == "query" else heads * e] = value
    qkv[0, heads * e if wrong == "query" else 0] = 1  # infinity times zero is none either
    store = torch.randn(WIDTH, SLOTS, 2, groups, PAGE, e, generator=rng).half()
    y = attended_alone(qkv, store, position, window, heads)
    assert y[0, :e].isnan().all()


@pytest.mark.parametrize("first", [PAGE - 1, PAGE, PAGE + 1])
def test_attention_to_the_first_that_a_window_shows(rng, first):
    """The last of a page among them."""
    heads, groups, e, window = 2, 1, 16, 20
    position = first + window - 1
    qkv = torch.randn(1, (heads + 2 * groups) * e, generator=rng).half()
    store = torch.randn(WIDTH, SLOTS, 2, groups, PAGE, e, generator=rng).half()
    y = attended_alone(qkv, store, position, window, heads)
    pages = store[:, 0].permute(1, 2, 0, 3, 4).flatten(2, 3).float()
    keys, values = pages[:, :, : position + 1]
    query = qkv[0, : heads * e].float().unflatten(0, (heads, e))
    expected = reference.attended(query, keys, values, SCALE, window, 0.0)
    assert_close(f"from {first}", expected.flatten(), y[0], 2 * BOUND)


@pytest.mark.parametrize("scope", ["", "head", "all"])
@pytest.mark.parametrize("splits", [1, 3])
def test_attention(rng, scope, splits):
    """Two sequences, at the edges of pages and anywhere; what runs not, writes nothing."""
    heads, groups, e = ((4, 2, 8), (3, 3, 24), (8, 1, 16))[below(rng, 3)]
    rope, window = (0, 4, 8)[below(rng, 3)], (0, 1, 20)[below(rng, 3)]
    cap, kind = (0.0, 5.0)[below(rng, 2)], ("rms", "layer")[below(rng, 2)] if scope else "rms"
    positions = [(0, PAGE - 1, PAGE, 2 * PAGE)[below(rng, 4)], 5, below(rng, WIDTH * PAGE)]
    live = torch.tensor([1, 0, 1], dtype=torch.int32)
    qkv = torch.randn(3, (heads + 2 * groups) * e, generator=rng).half()
    store = torch.randn(3 * WIDTH, SLOTS, 2, groups, PAGE, e, generator=rng).half()
    table = torch.randperm(3 * WIDTH, generator=rng).view(3, WIDTH).int()
    angles = torch.randn(WIDTH * PAGE, max(rope, 1), generator=rng)
    sizes = (e, e) if scope == "head" else (heads * e, groups * e)
    weights = [torch.randn(size, generator=rng) for size in sizes]
    biases = [torch.randn(size, generator=rng) if kind == "layer" else None for size in sizes]
    columns, rows = triton.next_power_of_2(max(e, 16)), 16
    parts = torch.full((3 * groups * splits * rows * (columns + 2),), torch.nan)
    counters = torch.zeros(3 * groups, dtype=torch.int32)
    y, before, slot = torch.full((3, heads * e), torch.nan).half(), store.clone(), below(rng, SLOTS)
    attention_kernel[(3, groups, splits)](
        qkv, store, table, torch.tensor(positions).int(), live, angles if rope else None,
        weights[0], biases[0], weights[1], biases[1], parts, counters, y,
        slot, WIDTH, EPSILON, SCALE,
        SLOTS=SLOTS, HEADS=heads, KV_HEADS=groups, E=e, BLOCK_E=columns, BLOCK_R=rows, PAGE=PAGE,
        ROPE=rope, NORM=kind, SCOPE=scope, WINDOW=window, CAP=cap, SPLITS=splits, WIDE=True,
    )  # fmt: skip
    assert int(counters.abs().sum()) == 0 and y[1].isnan().all()
    q, k, v = qkv.float().split([heads * e, groups * e, groups * e], dim=1)
    if scope == "all":
        q, k = normal(q, weights[0], biases[0], kind), normal(k, weights[1], biases[1], kind)
    q, k, v = (part.unflatten(1, (-1, e)) for part in (q, k, v))
    if scope == "head":
        q, k = normal(q, weights[0], biases[0], kind), normal(k, weights[1], biases[1], kind)
    if rope:
        q, k = (reference.rotated(part, angles[positions]) for part in (q, k))
    for b, position in ((0, positions[0]), (2, positions[2])):
        place = int(table[b, position // PAGE]), slot, slice(None), slice(None), position % PAGE
        assert_close("appended", torch.stack((k[b], v[b])), store[place], BOUND)
        before[place] = store[place]
        pages = store[table[b].long(), slot].permute(1, 2, 0, 3, 4).flatten(2, 3).float()
        keys, values = pages[:, :, : position + 1]
        expected = reference.attended(q[b], keys, values, SCALE, window or None, cap)
        assert_close(f"at {position}", expected.flatten(), y[b], 2 * BOUND)
    assert torch.equal(store, before)


def normal(x, weight, bias, kind):
    return reference.normalised(x, weight, bias, EPSILON, kind)


def step(
    x, weights: Packed | torch.Tensor, y, bias=None, gated=False, cores=1, **options
) -> torch.Tensor:
    """One launch of the step's matmul, with y (M, N); the sums that it leaves, (ranges, 2, M)."""
    (m, k), extra = x.shape, {"perm_ptr": None}
    if isinstance(weights, torch.Tensor):
        pointers = (weights, None, None, None, None)
        kind = Format("plain", 16, 0, even=True, asm=False)
    else:
        matrix = to_gpu(weights)
        pointers, extra["perm_ptr"] = fused.pointers(matrix), matrix.perm
        kind = fused.format_of(matrix, k, 1)
    n = weights.shape[0]
    sizes = launch.step(m, n, k, kind, cores, gated)
    sizes = replace(sizes, WARPS=2, CHUNKS=2)  # several slices and ranges at small sizes
    grid = sizes.grid(m, n, k, kind, gated)
    parts = torch.full((sizes.part_values(m, grid),), torch.nan)
    counters, sums = torch.zeros(grid[0] * grid[2]).int(), torch.full((grid[0], 2, m), torch.nan)
    gemv_kernel[grid](
        x, *pointers, bias, y, parts, counters, m, n, k, x.stride(0), y.stride(0), sizes.TILES,
        FORMAT=kind, DTYPE=tl.float16, GATED=gated, epsilon=EPSILON, out_sums_ptr=sums,
        **fused.gemv_options(sizes), **extra, **options,
    )  # fmt: skip
    assert not counters.any()
    return sums


def drawn(rng, n: int, k: int, plain: bool, permuted: bool = False):
    """(W as a launch takes it, W in float32), of outputs of about unit RMS."""
    if plain:
        weight = (torch.randn(n, k, generator=rng) * k**-0.5).half()
        return weight, weight.float()
    specs = every_spec()
    packed = random_packed(rng, n, k, specs[below(rng, len(specs))], permuted)
    packed = scaled(packed, k**-0.5)
    return packed, unpack(packed)


def sums_of(x, parts: int) -> torch.Tensor:
    """Over x's squares and values, (parts, 2, M)."""
    pieces = x.tensor_split(parts, dim=1)
    return torch.stack([torch.stack((p.square().sum(1), p.sum(1))) for p in pieces])


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("norm", ["", "rms", "layer"])
@pytest.mark.parametrize("post", [False, True])
def test_before_a_product(rng, norm, post, plain):
    m, n, k = 1 + below(rng, 20), 1 + below(rng, 40), (16, 100, 300)[below(rng, 3)]
    weights, w = drawn(rng, n, k, plain, permuted=bool(below(rng, 2)))
    x, delta = (torch.randn(m, k, generator=rng) * 3 for _ in range(2))
    scale, offset, own = (torch.randn(k, generator=rng) for _ in range(3))
    y, stream, options = torch.full((m, n), torch.nan), torch.full((m, k), torch.nan), {}
    expected = x
    if post:
        options = {"delta_ptr": delta, "post_ptr": own, "stream_ptr": stream}
        expected = reference.returned(x, delta, own, EPSILON)
    if norm:
        bias = offset if norm == "layer" else None
        options |= {"norm_ptr": scale, "norm_bias_ptr": bias, "NORM": norm}
    step(x, weights, y, **options)
    if norm and not post:
        parts = sums_of(x, 1 + below(rng, 40))
        again = torch.full_like(y, torch.nan)
        step(x, weights, again, sums_ptr=parts, ranges=len(parts), **options)
        torch.testing.assert_close(again, y, rtol=2e-2, atol=2e-2)
    if post:
        assert_close("stream", expected, stream, 1e-5)
    if norm:
        expected = reference.normalised(expected, scale, bias, EPSILON, norm)
    size = expected.abs() @ w.abs().T
    assert ((y - expected @ w.T).abs() <= 4e-3 * size + 1e-6).all()


@pytest.mark.parametrize("activation", ["", *reference.ACTIVATIONS])
@pytest.mark.parametrize("gate", ["", "stacked", "apart"])
def test_after_a_product(rng, activation, gate):
    if gate and not activation:
        pytest.skip("a gate has an activation")
    m, k, n = 1 + below(rng, 20), 64, 2 * (1 + below(rng, 20))
    weights, w = drawn(rng, n, k, plain=bool(below(rng, 2)))
    x, bias = (torch.randn(*shape, generator=rng).half() for shape in ((m, k), (n,)))
    outputs = n // 2 if gate == "stacked" else n
    live, cap = below(rng, 2, m).int(), (0.0, 3.0)[below(rng, 2)]
    wide = torch.randn(m, outputs + 3, generator=rng)
    y, held = wide[:, 1 : 1 + outputs], wide.clone()
    other = torch.randn(m, outputs + 3, generator=rng)[:, :outputs]
    options = {"gate_ptr": other} if gate == "apart" else {}
    sums = step(
        x, weights, y, bias, gate == "stacked", below(rng, 2) * 9 + 1, live_ptr=live, add_ptr=y,
        ACTIVATION=activation, CAP=cap, **options,
    )  # fmt: skip
    expected = x.float() @ w.T + bias.float()
    activate = reference.ACTIVATIONS.get(activation, lambda x: x)
    if gate == "stacked":
        expected = activate(expected[:, :outputs]) * expected[:, outputs:]
    else:
        expected = activate(other) * expected if gate else activate(expected)
    if cap:
        expected = cap * torch.tanh(expected / cap)
    expected = torch.where(live[:, None] != 0, expected, 0) + held[:, 1 : 1 + outputs]
    assert ((y - expected).abs() <= 2e-2 * (1 + expected.abs())).all()
    held[:, 1 : 1 + outputs] = y
    assert torch.equal(wide, held)  # nothing beside
    torch.testing.assert_close(sums.sum(0), sums_of(y, 1)[0], rtol=1e-4, atol=1e-3)


def test_embedding_of_every_scheme(rng):
    specs = every_spec()  # the last is the only K-quant
    for spec, d in product([*specs[below(rng, 9) : -1 : 9], specs[-1]], (48, 144)):
        packed = random_packed(rng, 20, d, spec, permuted=bool(below(rng, 2)))
        matrix, tokens = to_gpu(packed), torch.tensor([19, -1, below(rng, 20)]).int()
        kind, x = fused.format_of(matrix, d, 1), torch.full((3, d), torch.nan)
        sums = torch.full((triton.cdiv(d, 16 * kind.chunk), 2, 3), torch.nan)
        embed_kernel[(3, triton.cdiv(d, 16 * kind.chunk))](
            tokens,
            *fused.pointers(matrix),
            matrix.perm,
            x,
            sums,
            2.5,
            d,
            FORMAT=kind,
            DTYPE=tl.float16,
        )
        assert_close(str(spec), unpack(packed)[tokens.clamp_min(0)] * 2.5, x, BOUND)
        torch.testing.assert_close(sums.sum(0), sums_of(x, 1)[0], rtol=1e-4, atol=1e-3)


def test_choice(rng):
    logits = torch.randn(6, 100, generator=rng)
    logits[0, [7, 50]], logits[1, 3], logits[2, 5] = 9.0, torch.nan, torch.inf
    logits[3, :] = -torch.inf
    ids = torch.zeros(6, dtype=torch.int32)
    choose_kernel[(6,)](logits, ids, 100, BLOCK_V=64)
    assert torch.equal(ids, reference.likeliest(logits))
    assert ids[:4].tolist() == [7, -1, -1, -1]
