"""The reference runtime: the plain torch decoder behind the runtime protocol."""

from collections.abc import Callable

import torch

from engine.architecture.config import ModelConfig
from engine.checkpoint import Checkpoint
from engine.kernels.dtypes import name_of
from engine.options import Slots
from engine.reference.cache import KVCache
from engine.reference.decoder import Decoder, Tap, load_decoder


class ReferenceRuntime:
    """A `Decoder`; weights, activations, keys and values have one dtype, quantized ones too."""

    name = "reference"
    prefill_chunk = 512

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.config: ModelConfig = decoder.config

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        config: ModelConfig,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        progress: Callable[[int], None] | None = None,
    ) -> "ReferenceRuntime":
        """Reads only the layers that `config` keeps; `progress` is called after each of them."""
        return cls(load_decoder(checkpoint, config, device, dtype, progress))

    @property
    def device(self) -> torch.device:
        return self.decoder.device

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.dtype

    @property
    def precision(self) -> str:
        return name_of(self.dtype)

    @property
    def threads(self) -> int:
        return torch.get_num_threads()

    @property
    def weight_bytes(self) -> int:
        tensors = [
            *self.decoder.outer.values(),
            *(t for w in self.decoder.layers for t in w.values()),
        ]
        return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())

    @property
    def weight_bytes_per_token(self) -> int:
        """All but the embedding, of which a token reads one row (a tied head is read whole)."""
        embedding = self.decoder.outer["embedding"]
        row = embedding.shape[1] * embedding.element_size()
        return self.weight_bytes - (0 if self.config.tied else embedding.nbytes) + row

    def new_cache(self, batch: int, capacity: int | None = None) -> KVCache:
        return self.decoder.new_cache(batch, capacity)

    def forward(
        self,
        tokens: torch.Tensor,
        cache: KVCache,
        slots: Slots | None = None,
        logits: str = "last",
        tap: Tap | None = None,
    ) -> torch.Tensor:
        return self.decoder.forward(tokens, cache, slots, logits, tap)
