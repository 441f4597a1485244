"""The tensors of a shallower model on their way: as they are stored, under their family's names."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from engine.architecture.config import ModelConfig
from engine.architecture.families import FAMILIES, layer_parts, layer_tensors, outer_tensors
from engine.checkpoint import Checkpoint
from engine.checkpoint.gguf_blocks import GgufBlocks
from engine.checkpoint.weights import Stored, layer_weights, outer_weights
from engine.errors import InputError
from engine.kernels.w4.format import Packed, concatenate


class Unsupported(InputError):
    """A format cannot hold a tensor or a rule of the model; the message is the reason."""


@dataclass(frozen=True)
class Item:
    """One tensor: its layer and slot (None: outside of them) and role, its names, its shape."""

    layer: int | None
    slot: int | None
    role: str
    source: str  # its name in the checkpoint
    name: str  # and in the result
    shape: tuple[int, ...]

    @property
    def module(self) -> str:
        return self.name.removesuffix(".weight")


def items(config: ModelConfig) -> Iterator[Item]:
    """Every tensor of the shallower model, layers renumbered by slot."""
    yield from outer_items(config)
    for slot in range(len(config.layers)):
        yield from layer_items(config, slot)


def outer_items(config: ModelConfig) -> Iterator[Item]:
    for role, (name, shape) in outer_tensors(config).items():
        yield Item(None, None, role, name, name, shape)


def layer_items(config: ModelConfig, slot: int) -> Iterator[Item]:
    layer = config.layers[slot].layer
    sources = layer_tensors(config, layer)
    for role, (name, shape) in layer_tensors(config, slot).items():
        yield Item(layer, slot, role, sources[role][0], name, shape)


def stored_tensors(
    checkpoint: Checkpoint, config: ModelConfig, slot: int | None
) -> Iterator[tuple[Item, Stored]]:
    """The tensors of one layer (None: those outside of the layers) as they lie on disk.

    Parts that the family stores fused are joined, whatever the checkpoint keeps apart. Unsupported
    where they are not quantized alike.
    """
    if slot is None:
        yield from zip(outer_items(config), _values(outer_weights(checkpoint, config)), strict=True)
        return
    layer = config.layers[slot].layer
    parts = dict(layer_weights(checkpoint, config, layer))
    fused = FAMILIES[config.family].fused
    for item in layer_items(config, slot):
        role, _, kind = item.role.partition(".")
        if role not in fused:
            yield item, parts[item.role]
            continue
        roles = [f"{part}.{kind}" if kind else part for part in fused[role]]
        names = layer_parts(config, layer)
        yield item, _join([parts[role] for role in roles], [names[role].name for role in roles])


def all_stored_tensors(
    checkpoint: Checkpoint, config: ModelConfig
) -> Iterator[tuple[Item, Stored]]:
    """Those outside of the layers, then layer by layer."""
    for slot in (None, *range(len(config.layers))):
        yield from stored_tensors(checkpoint, config, slot)


def _values(pairs: Iterator[tuple[str, Stored]]) -> Iterator[Stored]:
    return (stored for _, stored in pairs)


def _join(parts: list[Stored], names: list[str]) -> Stored:
    """Matrices of one kind, one after the other."""
    tensors = [part for part in parts if isinstance(part, torch.Tensor)]
    blocks = [part for part in parts if isinstance(part, GgufBlocks)]
    packed = [part for part in parts if isinstance(part, Packed)]
    if len(tensors) == len(parts) and len({tensor.dtype for tensor in tensors}) == 1:
        return torch.cat(tensors)
    if len(blocks) == len(parts) and len({block.type for block in blocks}) == 1:
        data = torch.cat([block.data for block in blocks])
        return GgufBlocks(blocks[0].type, (len(data), blocks[0].shape[1]), data)
    if len(packed) == len(parts):
        try:
            return concatenate(packed)
        except ValueError:
            pass
    raise Unsupported(f"{', '.join(names)} are one matrix in this family, but quantized apart")
