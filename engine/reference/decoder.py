"""The reference decoder: plain torch, one function a part, the oracle of every other backend."""

from collections.abc import Callable, Sequence
from copy import copy
from operator import index
from typing import Any, SupportsIndex

import torch
from torch.nn import functional

from engine.architecture.config import LayerConfig, ModelConfig
from engine.architecture.rope import rotary
from engine.checkpoint import Checkpoint
from engine.checkpoint.weights import Observed, Weights, load_layer, load_outer
from engine.errors import InputError
from engine.kernels.layer.reference import ACTIVATIONS, normalised
from engine.options import Slots
from engine.reference.cache import KVCache, Lengths

Tap = Callable[[int, torch.Tensor], None]  # (boundary, residual stream (B, T, D)) -> None

IDS = (torch.int64, torch.int32)  # dtypes of tokens
FOREIGN = "cache: expected one that this model made, found another's"


class Decoder:
    """A decoder over its kept layers; `layers[slot]` holds that slot's weights by role."""

    def __init__(self, config: ModelConfig, outer: Weights, layers: Sequence[Weights]) -> None:
        self.config, self.outer, self.layers = config, outer, list(layers)

    @property
    def device(self) -> torch.device:
        return self.outer["embedding"].device

    @property
    def dtype(self) -> torch.dtype:
        return self.outer["embedding"].dtype

    def new_cache(self, batch: int, capacity: int | None = None) -> KVCache:
        """Empty, for so many sequences, where the weights are and in their dtype."""
        return KVCache(self.config, batch, self.device, self.dtype, capacity)

    @torch.no_grad()
    def forward(
        self,
        tokens: torch.Tensor,
        cache: KVCache,
        slots: Slots | None = None,
        logits: str = "last",
        tap: Tap | None = None,
    ) -> torch.Tensor:
        """tokens (B, T) int64 -> logits (B, 1, V) for "last" or (B, T, V) for "all", float32.

        Negative tokens are left padding: they are not cached, and what is computed at them means
        nothing. `slots` are the slots to run, ascending, for all sequences or one list each.
        `tap` is called with every boundary b, the residual stream before slot b, and with the
        last one, which is taken before the final norm; it keeps what it wants.
        """
        check_logits(logits)
        x, positions, chosen = self.begin(tokens, cache, slots)
        angles = Angles(self.config, positions)
        everyone = torch.arange(cache.batch, device=self.device)
        for slot, (layer, weights) in enumerate(zip(self.config.layers, self.layers, strict=True)):
            if tap is not None:
                tap(slot, x)
            rows = chosen[:, slot].nonzero().squeeze(1)
            if len(rows) == len(everyone):
                x = run_layer(self.config, layer, weights, x, angles, cache, slot, everyone)
            elif len(rows):
                part = run_layer(
                    self.config, layer, weights, x[rows], angles.of(rows), cache, slot, rows
                )
                x = x.index_copy(0, rows, part)
        if tap is not None:
            tap(len(self.layers), x)
        return self.head(x if logits == "all" else x[:, -1:])

    def begin(
        self, tokens: torch.Tensor, cache: KVCache, slots: Slots | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Checks a call against the cache; embeddings (B, T, D), positions (B, T), slots (B, S)."""
        positions, chosen = check_call(self.config, tokens, cache, slots)
        return self.embed(tokens), positions.to(self.device), chosen.to(self.device)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens (B, T) -> the residual stream (B, T, D) before the first slot."""
        x = functional.embedding(tokens.clamp_min(0).to(self.device), self.outer["embedding"])
        if self.config.embedding_scale != 1.0:
            x = x * torch.tensor(self.config.embedding_scale, dtype=x.dtype, device="cpu")
        return x

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """Residual stream (B, T, D) -> logits (B, T, V) float32, through the final norm."""
        x = normalise(self.config, x, self.outer["norm"], self.outer.get("norm.bias"))
        logits = functional.linear(x, self.outer["head"], self.outer.get("head.bias")).float()
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)


def load_decoder(
    checkpoint: Checkpoint,
    config: ModelConfig,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int], None] | None = None,
) -> Decoder:
    """Reads only the layers that `config` keeps; `progress` is called after each of them."""

    def placed(weights: Weights) -> Weights:
        moved = {id(t): t.to(device=device, dtype=dtype) for t in weights.values()}
        return {role: moved[id(tensor)] for role, tensor in weights.items()}

    outer = placed(load_outer(checkpoint, config))
    layers = []
    for entry in config.layers:
        layers.append(placed(load_layer(checkpoint, config, entry.layer)))
        if progress is not None:
            progress(entry.layer)
    return Decoder(config, outer, layers)


class Angles:
    """Positions of a call, and cos and sin for every kind of rotary embedding in the model."""

    def __init__(self, config: ModelConfig, positions: torch.Tensor) -> None:
        self.positions = positions  # (B, T) int64, -1 at padding
        self.tables = {rope: rotary(rope, positions) for rope in config.ropes}

    def of(self, rows: torch.Tensor) -> "Angles":
        """The same for some of the sequences."""
        part = copy(self)
        part.positions = self.positions[rows]
        part.tables = {rope: (cos[rows], sin[rows]) for rope, (cos, sin) in self.tables.items()}
        return part


def check_call(
    config: ModelConfig, tokens: torch.Tensor, cache: Lengths, slots: Slots | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions (B, T), -1 at padding, and who runs what (B, S) bool; InputError where a call of
    any runtime breaks a rule of the protocol."""
    check_cache(config, cache)
    if tokens.is_meta or tokens.dtype not in IDS:
        raise InputError(f"tokens: expected ids, found {tokens.dtype} on {tokens.device}")
    if tokens.ndim != 2 or tokens.shape[0] != cache.batch or tokens.shape[1] < 1:
        raise InputError(
            f"tokens: expected shape ({cache.batch}, T >= 1), found {tuple(tokens.shape)}"
        )
    padding = (tokens < 0).sum(dim=1)
    if bool((tokens[:, 1:] < 0).logical_and(tokens[:, :-1] >= 0).any()):
        raise InputError("tokens: padding (negative ids) may only stand to the left")
    if bool((tokens >= config.vocab_size).any()):
        raise InputError(
            f"tokens: expected ids below {config.vocab_size}, found {int(tokens.max())}"
        )
    start = cache.positions
    end = int((start + tokens.shape[1] - padding.cpu()).max())
    if end > config.max_context:
        raise InputError(
            f"context: the model holds {config.max_context} positions, this call needs {end}"
        )
    steps = torch.arange(tokens.shape[1], device=tokens.device) - padding[:, None]
    positions = torch.where(steps >= 0, steps + start.to(tokens.device)[:, None], -1)
    return positions, choose_slots(config, cache, slots)


def check_logits(logits: str) -> None:
    if logits not in ("last", "all"):
        raise InputError(f"logits: expected 'last' or 'all', found {logits!r}")


def check_cache(config: ModelConfig, cache: Any, kind: type[Lengths] = Lengths) -> None:
    """InputError for what is no cache of `kind`, and for that of another model."""
    if not isinstance(cache, kind) or (cache.config is not config and cache.config != config):
        raise InputError(FOREIGN)


def choose_slots(config: ModelConfig, cache: Lengths, slots: Slots | None) -> torch.Tensor:
    """(B, S) bool: who runs what. InputError for a slot out of range or with a gap in its cache."""
    chosen = mask_slots(config, cache.batch, slots)
    for sequence, own in enumerate(chosen):
        cache.require(sequence, own.nonzero().flatten().tolist())
    return chosen


def mask_slots(config: ModelConfig, batch: int, slots: Slots | None) -> torch.Tensor:
    """(B, S) bool: who is to run what. InputError for a slot out of range."""
    total = len(config.layers)
    try:
        given = [_numbers(each) for each in (range(total) if slots is None else slots)]
    except TypeError:
        raise InputError(
            f"slots: expected ascending numbers in 0-{total - 1}, found {slots!r}"
        ) from None
    shared = [each for each in given if isinstance(each, int)]
    apart = [each for each in given if isinstance(each, list)]
    lists = apart or [shared] * batch
    if len(lists) != batch or (apart and shared):
        raise InputError(f"slots: expected {batch} lists, found {len(lists)}")
    chosen = torch.zeros(batch, total, dtype=torch.bool, device="cpu")
    for sequence, own in enumerate(lists):
        ascending = all(a < b for a, b in zip(own, own[1:], strict=False))
        if not own or not ascending or own[0] < 0 or own[-1] >= total:
            raise InputError(f"slots: expected ascending numbers in 0-{total - 1}, found {own}")
        chosen[sequence, own] = True
    return chosen


def _numbers(slots: SupportsIndex | Sequence[SupportsIndex]) -> int | list[int]:
    """A slot, or those of a sequence, of any integer type; else TypeError."""
    try:
        return index(slots)  # type: ignore[arg-type]
    except TypeError:
        return [index(slot) for slot in slots]  # type: ignore[union-attr]


def run_layer(
    config: ModelConfig,
    layer: LayerConfig,
    weights: Weights,
    x: torch.Tensor,
    angles: Angles,
    cache: KVCache,
    slot: int,
    rows: torch.Tensor,
) -> torch.Tensor:
    """One layer over the residual stream x (R, T, D) of sequences `rows`; appends to the cache."""

    def norm(x: torch.Tensor, role: str) -> torch.Tensor:
        return normalise(config, x, weights[role], weights.get(f"{role}.bias"))

    normed = norm(x, "attn_norm") if config.pre_norm else x
    attended = attention(config, layer, weights, normed, angles, cache, slot, rows)
    if config.parallel:
        return x + attended + mlp(config, weights, normed)
    x = x + (norm(attended, "attn_post_norm") if config.post_norm else attended)
    widened = mlp(config, weights, norm(x, "mlp_norm") if config.pre_norm else x)
    return x + (norm(widened, "mlp_post_norm") if config.post_norm else widened)


def attention(
    config: ModelConfig,
    layer: LayerConfig,
    weights: Weights,
    x: torch.Tensor,
    angles: Angles,
    cache: KVCache,
    slot: int,
    rows: torch.Tensor,
) -> torch.Tensor:
    """Grouped-query attention of x (R, T, D) over the cache: (R, T, D)."""
    query, key, value = (linear(x, weights, role) for role in ("q", "k", "v"))
    if config.qk_norm == "all":
        query = normalise(config, query, weights["q_norm"])
        key = normalise(config, key, weights["k_norm"])
    query, key, value = (heads_first(t, config.head_dim) for t in (query, key, value))
    if config.qk_norm == "head":
        query = normalise(config, query, weights["q_norm"], weights.get("q_norm.bias"))
        key = normalise(config, key, weights["k_norm"], weights.get("k_norm.bias"))
    if layer.rope is not None:
        cos, sin = angles.tables[layer.rope]
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    keys, values = cache.append(slot, rows, angles.positions, key, value)

    visible = visibility(angles.positions, keys.shape[2], layer.window)
    mixed = attend(config, query, keys, values, visible)
    return linear(mixed.transpose(1, 2).flatten(2), weights, "o")


def attend(
    config: ModelConfig,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    visible: torch.Tensor,
) -> torch.Tensor:
    """softmax(scale * query @ keys) @ values: query (R, H, T, E), keys (R, G, C, E), visible
    (R, T, C) -> (R, H, T, E). A soft cap bends the scores, which torch's own function cannot;
    without one keys and values may also come repeated, (R, H, C, E)."""
    scale, cap = config.attention_scale, config.attention_softcap
    if cap is None:
        mask, grouped = visible[:, None], keys.shape[1] < query.shape[1]
        return functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, scale=scale, enable_gqa=grouped
        )
    by_group = query.unflatten(1, (config.kv_heads, -1))  # (R, G, H / G, T, E)
    scores = cap * torch.tanh(by_group @ keys[:, :, None].transpose(-1, -2) * (scale / cap))
    scores = scores.masked_fill(~visible[:, None, None], torch.finfo(scores.dtype).min)
    shares = scores.softmax(dim=-1, dtype=torch.float32).to(values.dtype)
    return (shares @ values[:, :, None]).flatten(1, 2)


def visibility(positions: torch.Tensor, context: int, window: int | None) -> torch.Tensor:
    """(B, T, C) bool: may the query at `positions` (B, T) see the key at each of C positions?

    Padding sees position 0, since a softmax over nothing is not a number.
    """
    query = positions[..., None].clamp_min(0)
    key = torch.arange(context, device=positions.device)
    visible = key <= query
    return visible if window is None else visible & (key > query - window)


def mlp(config: ModelConfig, weights: Weights, x: torch.Tensor) -> torch.Tensor:
    """The feed-forward part, gated or plain: (R, T, D) -> (R, T, D)."""
    activation = ACTIVATIONS[config.activation]
    widened = linear(x, weights, "up")
    if config.gated:
        widened = activation(linear(x, weights, "gate")) * widened
    else:
        widened = activation(widened)
    return linear(widened, weights, "down")


def linear(x: torch.Tensor, weights: Weights, role: str) -> torch.Tensor:
    """x (..., K) through a role's matrix; weights of another dtype are cast as they are used."""
    if isinstance(weights, Observed):
        weights.observe(role, x)
    bias = weights.get(f"{role}.bias")
    return functional.linear(x, weights[role].to(x.dtype), None if bias is None else bias.to(x))


def heads_first(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """(R, T, H * E) -> (R, H, T, E)."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def normalise(
    config: ModelConfig, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """RMSNorm or LayerNorm over the last dimension, in float32, back in the dtype of x."""
    scale = weight.float() + config.norm_offset
    shift = None if bias is None else bias.float()
    return normalised(x.float(), scale, shift, config.norm_eps, config.norm).to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the first values of each head, x (R, H, T, E) by cos and sin (R, T, dim)."""
    dim = cos.shape[-1]
    rotated, rest = x[..., :dim], x[..., dim:]
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    first, second = rotated.chunk(2, dim=-1)
    rotated = rotated * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((rotated, rest), dim=-1) if rest.shape[-1] else rotated
