"""`W4Embedding`: rows of a packed matrix, as an embedding of transformers' models."""

from collections.abc import Callable

import torch
from torch import nn

from engine.kernels.w4.format import Packed, take, unpack


class W4Embedding(nn.Module):
    """ids (...) -> their rows (..., K) of a packed matrix (N, K), in `dtype` and times `scale`."""

    def __init__(self, packed: Packed, scale: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.packed, self.scale, self.dtype = packed, scale, dtype
        self.num_embeddings, self.embedding_dim = packed.shape

    def _apply(
        self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> "W4Embedding":
        """A cast is one of the rows that it gives; the packed matrix is moved, never cast."""
        like = fn(torch.empty(0, dtype=self.dtype, device=self.packed.device))
        self.dtype, self.packed = like.dtype, self.packed.to(like.device)
        return self

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        used, places = ids.unique(return_inverse=True)
        if used.numel() and used[0] < 0:
            raise IndexError(
                f"ids must be from 0 to {self.num_embeddings - 1}, found {int(used[0])}"
            )
        self.packed = packed = self.packed.to(ids.device)
        rows = take(packed.tensors(), used)
        values = unpack(Packed(packed.spec, (len(used), packed.shape[1]), **rows))
        return values.to(self.dtype)[places] * torch.tensor(self.scale).to(self.dtype)
