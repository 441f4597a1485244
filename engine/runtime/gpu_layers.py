"""Many tokens at once on a GPU, torch around our matmuls: prompts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.architecture.config import LayerConfig, ModelConfig
from engine.kernels.layer.reference import ACTIVATIONS, normalised
from engine.reference.decoder import attend, heads_first, rotate, visibility
from engine.runtime.angles import DeviceAngles
from engine.runtime.gpu_cache import GpuCache, Places
from engine.runtime.gpu_weights import Layer, Outer, rows_of


@dataclass(frozen=True)
class Rows:
    """Some sequences of a call: what every layer needs of them."""

    index: torch.Tensor  # (R,) int64, which of the batch
    positions: torch.Tensor  # (R, T) int64, -1 at padding
    places: Places
    angles: Sequence[tuple[torch.Tensor, torch.Tensor]]  # cos, sin (R, T, dim) a kind of rope


class ManyTokens:
    """The decoder over tokens (B, T); the residual stream is float32, all else in `dtype`."""

    def __init__(
        self,
        config: ModelConfig,
        outer: Outer,
        layers: Sequence[Layer],
        angles: DeviceAngles,
        dtype: torch.dtype,
    ) -> None:
        self.config, self.outer, self.layers = config, outer, layers
        self.angles, self.dtype = angles, dtype

    def __call__(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        chosen: torch.Tensor,
        cache: GpuCache,
        everything: bool,
    ) -> torch.Tensor:
        """Logits (B, T, V) float32 or, unless `everything`, (B, 1, V) of the last position.

        tokens and positions (B, T), -1 at padding, and who runs what (B, S) are on the CPU. Appends
        to the cache, which has room.
        """
        x = self._embed(tokens)
        whole = self._rows(cache, torch.arange(cache.batch, device="cpu"), positions)
        for slot, (entry, layer) in enumerate(zip(self.config.layers, self.layers, strict=True)):
            index = chosen[:, slot].nonzero().squeeze(1)
            if len(index) == cache.batch:
                x = self._layer(entry, layer, x, cache, slot, whole)
            elif len(index):
                rows = self._rows(cache, index, positions[index])
                part = self._layer(entry, layer, x[rows.index], cache, slot, rows)
                x = x.index_copy(0, rows.index, part)
        return self._head(x if everything else x[:, -1:])

    def _rows(self, cache: GpuCache, index: torch.Tensor, positions: torch.Tensor) -> Rows:
        places, at = Places(cache, index, positions), positions.to(self.angles.device)
        angles = []
        for table in self.angles.tables:
            cos, sin = table[at.clamp_min(0)].chunk(2, dim=-1)
            angles.append((torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)))
        return Rows(index.to(self.angles.device), at, places, angles)

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, T) -> (B, T, D) float32."""
        x = rows_of(self.outer.embedding, tokens.clamp_min(0).to(self.angles.device))
        return x.float() * self.config.embedding_scale

    def _head(self, x: torch.Tensor) -> torch.Tensor:
        x = self._norm(x, self.outer, "norm")
        logits = self.outer.projections["head"](x, torch.float32)
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _layer(
        self,
        entry: LayerConfig,
        layer: Layer,
        x: torch.Tensor,
        cache: GpuCache,
        slot: int,
        rows: Rows,
    ) -> torch.Tensor:
        """One layer over the residual stream x (R, T, D) float32; appends to the cache."""
        config = self.config
        normed = self._norm(x, layer, "attn_norm") if config.pre_norm else x.to(self.dtype)
        attended = self._attention(entry, layer, normed, cache, slot, rows)
        if config.parallel:
            return x + attended + self._mlp(layer, normed)
        x = x + (self._norm(attended, layer, "attn_post_norm") if config.post_norm else attended)
        normed = self._norm(x, layer, "mlp_norm") if config.pre_norm else x.to(self.dtype)
        widened = self._mlp(layer, normed)
        return x + (self._norm(widened, layer, "mlp_post_norm") if config.post_norm else widened)

    def _attention(
        self,
        entry: LayerConfig,
        layer: Layer,
        x: torch.Tensor,
        cache: GpuCache,
        slot: int,
        rows: Rows,
    ) -> torch.Tensor:
        """(R, T, D) in `dtype` -> the same in float32."""
        config = self.config
        widths = [heads * config.head_dim for heads in (config.heads, *[config.kv_heads] * 2)]
        query, key, value = layer.projections["qkv"](x).split(widths, dim=-1)
        if config.qk_norm == "all":
            query, key = self._norm(query, layer, "q_norm"), self._norm(key, layer, "k_norm")
        query, key, value = (heads_first(t, config.head_dim) for t in (query, key, value))
        if config.qk_norm == "head":
            query, key = self._norm(query, layer, "q_norm"), self._norm(key, layer, "k_norm")
        if entry.rope is not None:
            cos, sin = rows.angles[config.ropes.index(entry.rope)]
            query = rotate(query.float(), cos, sin).to(self.dtype)
            key = rotate(key.float(), cos, sin).to(self.dtype)
        keys, values = cache.append(slot, rows.places, key, value)
        if config.attention_softcap is None:  # torch's fast kernels with a mask know no groups
            repeats = config.heads // config.kv_heads
            keys, values = (t.repeat_interleave(repeats, dim=1) for t in (keys, values))
        visible = visibility(rows.positions, keys.shape[2], entry.window)
        mixed = attend(config, query, keys, values, visible)
        return layer.projections["o"](mixed.transpose(1, 2).flatten(2), torch.float32)

    def _mlp(self, layer: Layer, x: torch.Tensor) -> torch.Tensor:
        """(R, T, D) in `dtype` -> the same in float32."""
        activation = ACTIVATIONS[self.config.activation]
        if self.config.gated:
            gate, up = layer.projections["gate_up"](x).chunk(2, dim=-1)
            widened = activation(gate.float()) * up.float()
        else:
            widened = activation(layer.projections["up"](x).float())
        return layer.projections["down"](widened.to(self.dtype), torch.float32)

    def _norm(self, x: torch.Tensor, layer: Layer, role: str) -> torch.Tensor:
        """Computed in float32, given in `dtype`."""
        weight, bias = layer.norms[role], layer.norms.get(f"{role}.bias")
        found = normalised(x.float(), weight, bias, self.config.norm_eps, self.config.norm)
        return found.to(self.dtype)
