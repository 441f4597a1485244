"""The protocol every backend keeps, and all that generation and evaluation know of a model.

    forward(tokens (B, T), cache, slots=None, logits="last" | "all") -> (B, 1 or T, V) float32

covers prefill, one step, and the verification of several tokens at once. Negative tokens are left
padding. The cache keeps a length for every (sequence, slot); a call at position p needs [0, p)
filled in every slot that it runs, and raises otherwise.

A runtime may offer besides, where it knows the likeliest token at less cost than its logits,

    greedy(tokens, cache) -> list[int]

which feeds one id to each sequence, -1 to those that have finished, and returns the others' next
ids: what `forward` and `engine.sample.likeliest` would, with the same errors.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from engine.architecture.config import ModelConfig


class Cache(Protocol):
    lengths: torch.Tensor  # (B, S) int64

    @property
    def nbytes(self) -> int: ...

    def truncate(self, lengths: int | Sequence[int] | torch.Tensor) -> None: ...


class Runtime(Protocol):
    name: str
    config: ModelConfig
    device: torch.device
    dtype: torch.dtype  # of activations
    precision: str  # the same for people, with what is rounded further

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights held."""

    @property
    def weight_bytes_per_token(self) -> int:
        """Bytes of weights that one decoded token reads."""

    def new_cache(self, batch: int, capacity: int | None = None) -> Cache: ...

    def forward(
        self,
        tokens: torch.Tensor,
        cache: Cache,
        slots: Sequence[int] | Sequence[Sequence[int]] | None = None,
        logits: str = "last",
    ) -> torch.Tensor: ...
