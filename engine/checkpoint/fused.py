"""A packed directory keeps q, k, v and gate, up apart; families that fuse them find them whole."""

from collections.abc import Iterable

import torch

from engine.architecture.config import ModelConfig
from engine.architecture.families import FAMILIES, layer_tensors, part_names
from engine.checkpoint import Checkpoint
from engine.errors import InputError
from engine.kernels.w4.format import Packed, concatenate


class FusedCheckpoint:
    """A `Checkpoint` over another that lacks its family's fused tensors but has their parts."""

    def __init__(self, stored: Checkpoint) -> None:
        self.path, self.config, self._stored = stored.path, stored.config, stored
        present = set(stored.names())
        self._parts = {
            whole: parts
            for whole, parts in _fused_names(self.config).items()
            if whole not in present and present.issuperset(parts)
        }
        apart = {part for parts in self._parts.values() for part in parts}
        self._names = [name for name in stored.names() if name not in apart] + list(self._parts)

    def names(self) -> Iterable[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        shapes = [self._stored.shape(part) for part in self._of(name)]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:]) if shapes[1:] else shapes[0]

    def nbytes(self, name: str) -> int:
        return sum(self._stored.nbytes(part) for part in self._of(name))

    def read(self, name: str) -> torch.Tensor:
        tensors = [self._stored.read(part) for part in self._of(name)]
        return torch.cat(tensors) if tensors[1:] else tensors[0]

    def packed(self, name: str) -> Packed | None:
        parts = [self._stored.packed(part) for part in self._of(name)]
        if None in parts:
            return None
        try:
            return concatenate(parts) if parts[1:] else parts[0]
        except ValueError as error:
            raise InputError(f"{self.path}: {name}: {error}") from None

    def _of(self, name: str) -> tuple[str, ...]:
        return self._parts.get(name, (name,))


def _fused_names(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Fused tensor -> its parts, of every layer."""
    fused = {}
    for layer in range(config.total_layers):
        parts = part_names(config, layer)
        for stored, (whole, _) in layer_tensors(config, layer).items():
            role, _, bias = stored.partition(".")
            if roles := FAMILIES[config.family].fused.get(role):
                fused[whole] = tuple(parts[f"{r}.{bias}" if bias else r] for r in roles)
    return fused
