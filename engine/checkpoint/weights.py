"""From a checkpoint to the matrices of a layer by role, checked against the config."""

import hashlib
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

import torch

from engine.architecture.config import ModelConfig
from engine.architecture.families import FAMILIES, layer_tensors, outer_tensors, role_shape
from engine.checkpoint import Checkpoint
from engine.checkpoint.gguf_blocks import GgufBlocks, dequantise
from engine.errors import InputError
from engine.kernels.w4.format import Packed, rows_of, unpack
from engine.kernels.w4.from_gguf import from_blocks

Weights = dict[str, torch.Tensor]  # role ("q", "q.bias", "attn_norm") -> tensor
Stored = GgufBlocks | Packed | torch.Tensor  # as it lies on disk


class Observed(Weights):
    """A layer's weights that show `observe` the role and the input (R, T, K) of every product."""

    def __init__(self, weights: Weights, observe: Callable[[str, torch.Tensor], None]) -> None:
        super().__init__(weights)
        self.observe = observe


def load_layer(checkpoint: Checkpoint, config: ModelConfig, layer: int) -> Weights:
    """Every tensor of one layer (an original number) by role, fused matrices split into views.

    InputError names the file and the tensor that is absent or of another shape.
    """
    return _by_role(checkpoint, config, layer, _read)


def stored_layer(checkpoint: Checkpoint, config: ModelConfig, layer: int) -> dict[str, Stored]:
    """The same, quantised matrices in their own bits."""
    return _by_role(checkpoint, config, layer, _stored)


def _by_role(checkpoint: Checkpoint, config: ModelConfig, layer: int, read: Callable) -> dict:
    weights = {}
    fused = FAMILIES[config.family].fused
    for stored, (name, shape) in layer_tensors(config, layer).items():
        matrix = read(checkpoint, name, shape)
        role, _, bias = stored.partition(".")
        parts = fused.get(role, (role,))
        sizes = [role_shape(config, part)[0] for part in parts]
        for part, piece in zip(parts, _split(matrix, sizes), strict=True):
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


def stored_outer(checkpoint: Checkpoint, config: ModelConfig) -> dict[str, Stored]:
    """The same in their own bits; no "head" where it is tied."""
    named = outer_tensors(config).items()
    return {role: _stored(checkpoint, name, shape) for role, (name, shape) in named}


def packed_form(stored: Stored, where: str) -> Packed | torch.Tensor:
    """GGUF blocks in the packed format; InputError that begins with `where` for scales of NaN."""
    if not isinstance(stored, GgufBlocks):
        return stored
    try:
        return from_blocks(stored.type, stored.shape, stored.data, where)
    except ValueError as error:
        raise InputError(str(error)) from None


def values(stored: Stored) -> torch.Tensor:
    """float32, whatever it is stored as."""
    if isinstance(stored, torch.Tensor):
        return stored.float()
    return dequantise(stored) if isinstance(stored, GgufBlocks) else unpack(stored)


def describe(stored: Stored) -> str:
    """In a few words: "float16", "Q4_1", "4 bits, group 64, symmetric"."""
    if isinstance(stored, torch.Tensor):
        return str(stored.dtype).removeprefix("torch.")
    if isinstance(stored, GgufBlocks):
        return stored.type
    spec = stored.spec
    words = [f"{spec.bits} bits", f"group {spec.group}" if spec.group else "a row", spec.scheme]
    if spec.scale_dtype != torch.float16:
        words.append(f"{spec.to_json()['scale_dtype']} scales")
    if stored.perm is not None:
        words.append("activation order")
    return ", ".join(words)


def is_quantised(checkpoint: Checkpoint) -> bool:
    """Whether matrices of its first layer are stored in 4 or 8 bits."""
    tensors = layer_tensors(checkpoint.config, checkpoint.config.layers[0].layer).values()
    return any(len(shape) == 2 and checkpoint.packed(name) is not None for name, shape in tensors)


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


def _split(matrix: Stored, sizes: list[int]) -> Sequence[Stored]:
    """Views of so many rows each."""
    if isinstance(matrix, torch.Tensor):
        return matrix.split(sizes)
    if isinstance(matrix, GgufBlocks):
        parts = matrix.data.split(sizes)
        return [GgufBlocks(matrix.type, (len(part), matrix.shape[1]), part) for part in parts]
    return [rows_of(matrix, start, stop) for start, stop in pairwise(accumulate(sizes, initial=0))]


def _stored(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> Stored:
    _check_shape(checkpoint, name, shape)
    found = checkpoint.packed(name)
    return checkpoint.read(name) if found is None else found


def _read(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    _check_shape(checkpoint, name, shape)
    return checkpoint.read(name)


def _check_shape(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> None:
    found = tuple(checkpoint.shape(name))  # raises for an absent tensor
    if found != shape:
        raise InputError(f"{checkpoint.path}: {name}: expected shape {shape}, found {found}")
