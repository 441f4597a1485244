"""From a checkpoint to the matrices of a layer by role, checked against the config."""

import hashlib

import torch

from engine.checkpoint import Checkpoint
from engine.config import ModelConfig
from engine.errors import InputError
from engine.families import FAMILIES, layer_tensors, outer_tensors, role_shape

Weights = dict[str, torch.Tensor]  # role ("q", "q.bias", "attn_norm") -> tensor


def load_layer(checkpoint: Checkpoint, config: ModelConfig, layer: int) -> Weights:
    """Every tensor of one layer (an original number) by role, fused matrices split into views.

    InputError names the file and the tensor that is absent or of another shape.
    """
    weights: Weights = {}
    fused = FAMILIES[config.family].fused
    for stored, (name, shape) in layer_tensors(config, layer).items():
        tensor = _read(checkpoint, name, shape)
        role, _, bias = stored.partition(".")
        parts = fused.get(role, (role,))
        rows = [role_shape(config, part)[0] for part in parts]
        for part, piece in zip(parts, tensor.split(rows), strict=True):
            weights[f"{part}.{bias}" if bias else part] = piece
    return weights


def load_outer(checkpoint: Checkpoint, config: ModelConfig) -> Weights:
    """Embedding, final norm and head; a tied head is the embedding itself."""
    weights = {
        role: _read(checkpoint, name, shape)
        for role, (name, shape) in outer_tensors(config).items()
    }
    weights.setdefault("head", weights["embedding"])
    return weights


def load_embedding(checkpoint: Checkpoint, config: ModelConfig) -> torch.Tensor:
    """(V, D), for those who need nothing else from outside the layers."""
    return _read(checkpoint, *outer_tensors(config)["embedding"])


def lineage_hash(checkpoint: Checkpoint, config: ModelConfig) -> str:
    """Of the norm weights, which 16-bit, GGUF and packed copies of one model share exactly.

    The offset is added as llama.cpp's converter adds it (Gemma), in float32.
    """
    digest = hashlib.sha256()
    tensors = [outer_tensors(config)["norm"]]
    for layer in range(config.total_layers):
        roles = layer_tensors(config, layer)
        tensors += [roles[role] for role in sorted(roles) if role.endswith("norm")]
    for name, shape in tensors:
        weight = _read(checkpoint, name, shape).float() + config.norm_offset
        digest.update(weight.numpy().tobytes())
    return digest.hexdigest()


def _read(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    found = tuple(checkpoint.shape(name))  # raises for an absent tensor
    if found != shape:
        raise InputError(f"{checkpoint.path}: {name}: expected shape {shape}, found {found}")
    return checkpoint.read(name)
