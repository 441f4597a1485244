"""A shallower GGUF of a GGUF: metadata and tensors copied by name, layers renumbered.

No block is touched. What metadata says of every layer is cut to the layers kept.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from engine.architecture.config import ModelConfig
from engine.checkpoint.gguf import GgufCheckpoint
from engine.checkpoint.gguf_file import GgufTensor
from engine.checkpoint.gguf_names import ROPE_TENSORS
from engine.errors import InputError
from engine.export.gguf_fields import read_back, require_layers
from engine.export.gguf_file import Place, Progress, Value, require_name, write_gguf

_LAYER = re.compile(r"blk\.(\d+)\.(.*)", re.ASCII)


def copy(
    checkpoint: GgufCheckpoint, config: ModelConfig, out: Path, progress: Progress | None = None
) -> None:
    """Writes the layers that `config` keeps to the new file `out`, byte for byte.

    Unsupported (an InputError) where the layers that stay would be taken for others: windows and
    layers without RoPE follow a period in GGUF.
    """
    require_name(out)
    require_cut(checkpoint, config)
    tensors = list(_kept(checkpoint, config))
    places = [Place(name, tensor.type.name, tensor.shape) for name, tensor in tensors]

    def data(first: int) -> Iterator[torch.Tensor]:
        for _, tensor in tensors[first:]:
            yield checkpoint.file.data[tensor.offset : tensor.offset + tensor.nbytes]

    fields = _fields(checkpoint, config)
    write_gguf(out, checkpoint.path, config, fields, places, data, progress)


def require_cut(checkpoint: GgufCheckpoint, config: ModelConfig) -> None:
    """Unsupported where the file would be read as other layers than those that stay."""
    file = checkpoint.file
    metadata = {key: field.value for key, field in _fields(checkpoint, config).items()}
    tensors = dict(_kept(checkpoint, config))
    for name in sorted(ROPE_TENSORS & tensors.keys()):
        kind, shape = tensors[name].type.name, tuple(tensors[name].shape)
        if kind != "F32" or len(shape) != 1:
            raise InputError(
                f"{checkpoint.path}: tensor {name!r}: expected F32 of one dimension, found {kind} "
                f"{shape}"
            )
    vectors = {
        name: file.floats(tensors[name].offset, tensors[name].shape[0])
        for name in ROPE_TENSORS & tensors.keys()
    }
    require_layers(config, read_back(metadata, tensors, vectors))


def _kept(checkpoint: GgufCheckpoint, config: ModelConfig) -> Iterator[tuple[str, GgufTensor]]:
    """(new name, tensor) of what stays, in the order of the file."""
    slots = {entry.layer: slot for slot, entry in enumerate(config.layers)}
    for name, tensor in checkpoint.file.tensors.items():
        match = _LAYER.fullmatch(name)
        if match is None:
            yield name, tensor
        elif int(match[1]) in slots:
            yield f"blk.{slots[int(match[1])]}.{match[2]}", tensor


def _fields(checkpoint: GgufCheckpoint, config: ModelConfig) -> dict[str, Value]:
    """The metadata, with as many layers as stay and their share of every list that has one entry
    a layer. Empty lists are left out: the package does not write them."""
    metadata = checkpoint.file.metadata
    prefix = f"{metadata['general.architecture']}."
    kept = [entry.layer for entry in config.layers]
    found = {key: Value(metadata[key], *metadata.kind(key)) for key in metadata}
    for key, field in found.items():
        if key == f"{prefix}block_count":
            many = isinstance(field.value, list)  # one number, repeated
            found[key] = replace(field, value=[len(kept)] * len(field.value) if many else len(kept))
        elif key.startswith(prefix) and isinstance(field.value, list):
            if len(field.value) == config.total_layers:
                found[key] = replace(field, value=[field.value[layer] for layer in kept])
    return {key: field for key, field in found.items() if field.value != []}
