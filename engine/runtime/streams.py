"""The CPU runtime from inside: the residual stream of whole windows through some of its slots."""

from collections.abc import Sequence

import torch

from engine.runtime.cpu import CpuCache, CpuRuntime


class CpuStreams:
    """Of a runtime with all layers of a model; keeps the protocol of `engine.pruning.score`."""

    def __init__(self, runtime: CpuRuntime) -> None:
        self.runtime, self.total = runtime, len(runtime.config.layers)
        self.vocab_size = runtime.config.vocab_size
        self._caches: dict[int, CpuCache] = {}  # by batch

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._stream(tokens, None, ())

    def run(self, slots: Sequence[int], x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return self._stream(tokens, x, slots) if len(slots) else x

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        tokens = torch.zeros(x.shape[:2], dtype=torch.int64)  # what enters is theirs already
        return self._stream(tokens, x, (), logits=True)

    def _stream(
        self,
        tokens: torch.Tensor,
        x: torch.Tensor | None,
        slots: Sequence[int],
        logits: bool = False,
    ) -> torch.Tensor:
        cache = self._caches.get(len(tokens)) or self.runtime.new_cache(*tokens.shape)
        self._caches[len(tokens)] = cache
        cache.truncate(0)
        return self.runtime.stream(tokens, cache, slots, x, logits)
