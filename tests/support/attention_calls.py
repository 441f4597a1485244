"""Calls of decode attention with random contents, and what they must give."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from support.close import assert_close

from engine.kernels.layer import reference
from engine.kernels.layer.cuda import Call, describe

BOUND = {torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
EPSILON = 1e-5
# Query heads, heads of keys, E: those of real families (Llama, Gemma, Phi-2, Qwen2), and odd ones.
SHAPES = (
    *((8, 2, 128), (4, 2, 256), (3, 3, 80), (7, 1, 64), (4, 2, 96)),
    *((16, 1, 16), (6, 2, 12), (3, 1, 5), (1, 1, 200)),
)


@dataclass(frozen=True, eq=False)
class Attention:
    """One call; the first of its sequences does not run."""

    heads: int
    qkv: torch.Tensor
    store: torch.Tensor
    table: torch.Tensor
    positions: torch.Tensor
    live: torch.Tensor
    y: torch.Tensor
    counters: torch.Tensor
    parts: torch.Tensor
    options: dict[str, Any]

    def call(self, **changed: Any) -> Call:
        return describe(
            self.qkv, self.store, self.table, self.positions, self.live, self.y,
            **{"parts": self.parts, "counters": self.counters, **self.options, **changed},
        )  # fmt: skip


def make(rng, dtype: torch.dtype, shape: tuple[int, int, int], positions: list[int], **options):
    """A case of one sequence that does not run, then of those at `positions`.

    Options: splits, page, window, cap, rope, scope, norm, slots.
    """

    def real(*size: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*size, generator=rng) * scale

    taken = dict(options)
    heads, groups, e = shape
    page, slots = taken.pop("page", 16), taken.pop("slots", 2)
    splits, rope, scope = taken.pop("splits", 1), taken.pop("rope", 0), taken.pop("scope", "")
    positions, count = [5, *positions], len(positions) + 1
    width = max(positions) // page + 1
    norms: tuple[torch.Tensor | None, ...] = (None,) * 4
    if scope:
        sizes = (e, e) if scope == "head" else (heads * e, groups * e)
        weights, biases = zip(*((real(n), real(n)) for n in sizes), strict=True)
        layer = taken.get("norm") == "layer"
        norms = weights[0], biases[0] if layer else None, weights[1], biases[1] if layer else None
    table = torch.randperm(count * width, generator=rng).view(count, width).int()
    parts = count * heads * (e + 2) * splits
    angles = real(max(positions) + 1, rope)
    return Attention(
        heads,
        real(count, (heads + 2 * groups) * e).to(dtype),
        real(count * width, slots, 2, groups, page, e).to(dtype),
        table,
        torch.tensor(positions, dtype=torch.int32),
        torch.tensor([0] + [1] * (count - 1), dtype=torch.int32),
        torch.full((count, heads * e), torch.nan, dtype=dtype),
        torch.zeros(count * groups, dtype=torch.int32),
        torch.full((parts,), torch.nan),
        {
            "slot": int(torch.randint(slots, (), generator=rng)), "scale": 1.5 / e**0.5,
            "angles": angles if rope else None, "norms": norms, "scope": scope, "splits": splits,
            "epsilon": EPSILON, **taken,
        },
    )  # fmt: skip


def random_case(rng, dtype: torch.dtype) -> Attention:
    """Any shape and options; positions at the edges of tiles, pages and parts, and anywhere."""

    def one_of(*choices):
        return choices[int(torch.randint(len(choices), (), generator=rng))]

    shape, page = one_of(*SHAPES), one_of(16, 32, 64)
    edges = (0, 1, 2, 15, 16, 17, page - 1, page, page + 1, 2 * page, 5 * page + 3)
    positions = [one_of(*edges), int(torch.randint(6 * page, (), generator=rng))]
    e = shape[2]
    return make(
        rng, dtype, shape, positions, page=page, splits=one_of(1, 2, 3, 8),
        window=one_of(0, 0, 1, 17, page), cap=one_of(0.0, 0.0, 2.0),
        rope=one_of(0, e // 4 * 2, e // 2 * 2), scope=one_of("", "head", "all"),
        norm=one_of("rms", "layer"),
    )  # fmt: skip


def without_results(case: Attention) -> Attention:
    """The same with buffers of its own for what it writes."""
    copies = {name: getattr(case, name).clone() for name in ("store", "y", "counters", "parts")}
    return replace(case, **copies)


def check(case: Attention, ran: Attention) -> None:
    """Holds what `ran`, a copy of `case`, wrote to its bounds: y, the token's keys and values, and
    nothing else."""
    options, bound = case.options, BOUND[case.store.dtype]
    _, _, _, groups, page, e = case.store.shape
    wide = case.qkv.double()
    q, k, v = wide.split([case.heads * e, groups * e, groups * e], dim=1)
    norms = [None if n is None else n.double() for n in options["norms"]]

    def normal(x: torch.Tensor, weight, bias) -> torch.Tensor:
        return reference.normalised(x, weight, bias, EPSILON, options.get("norm", "rms"))

    if options["scope"] == "all":
        q, k = normal(q, *norms[:2]), normal(k, *norms[2:])
    q, k, v = (part.unflatten(1, (-1, e)) for part in (q, k, v))
    if options["scope"] == "head":
        q, k = normal(q, *norms[:2]), normal(k, *norms[2:])
    if options["angles"] is not None:
        angles = options["angles"].double()[case.positions.long()]
        q, k = reference.rotated(q, angles), reference.rotated(k, angles)
    assert not ran.counters.any() and ran.y[0].isnan().all()
    before = case.store.clone()
    for b, position in enumerate(case.positions[1:].tolist(), 1):
        place = int(case.table[b, position // page]), options["slot"]
        own = ran.store[place][:, :, position % page]
        assert_close("appended", torch.stack((k[b], v[b])), own, bound)
        before[place][:, :, position % page] = own
        pages = ran.store[case.table[b].long(), options["slot"]].permute(1, 2, 0, 3, 4)
        keys, values = pages.flatten(2, 3)[:, :, : position + 1].double()
        query = q[b].to(case.store.dtype).double()  # rounded before the products
        expected = reference.attended(
            query, keys, values, options["scale"], options.get("window") or None,
            options.get("cap", 0.0),
        )  # fmt: skip
        assert_close(f"at {position}", expected.flatten(), ran.y[b], bound)
    assert torch.equal(ran.store, before)
