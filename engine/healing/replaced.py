"""A checkpoint some of whose tensors are other ones, held in memory, or all of them rounded."""

import math
from collections.abc import Collection, Mapping

import torch

from engine.checkpoint import Checkpoint
from engine.checkpoint.gguf_blocks import GgufBlocks
from engine.kernels.dtypes import name_of
from engine.kernels.w4.format import Packed, Spec


class Replaced:
    """`base` with `tensors`, under their Hugging Face names, in the place of its own."""

    def __init__(self, base: Checkpoint, tensors: Mapping[str, torch.Tensor]) -> None:
        self.base, self.tensors = base, tensors
        self.path, self.config = base.path, base.config

    def names(self) -> Collection[str]:
        return self.base.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.base.shape(name)

    def dtype(self, name: str) -> str | None:
        found = self.tensors.get(name)
        return self.base.dtype(name) if found is None else name_of(found.dtype)

    def nbytes(self, name: str) -> int:
        found = self.tensors.get(name)
        return self.base.nbytes(name) if found is None else found.nbytes

    def read(self, name: str) -> torch.Tensor:
        found = self.tensors.get(name)
        return self.base.read(name) if found is None else found

    def packed(self, name: str) -> GgufBlocks | Packed | None:
        return None if name in self.tensors else self.base.packed(name)

    def spec(self, name: str) -> Spec | None:
        return None if name in self.tensors else self.base.spec(name)

    def forget(self) -> None:
        self.base.forget()


class Rounded(Replaced):
    """`base` as `engine.export.hf` writes it in `to`: every tensor, quantized ones too."""

    def __init__(self, base: Checkpoint, to: torch.dtype) -> None:
        super().__init__(base, {})
        self.to = to

    def dtype(self, name: str) -> str:
        return name_of(self.to)

    def nbytes(self, name: str) -> int:
        return math.prod(self.shape(name)) * self.to.itemsize

    def read(self, name: str) -> torch.Tensor:
        return super().read(name).to(self.to)

    def packed(self, name: str) -> None:
        return None

    def spec(self, name: str) -> None:
        return None
