"""From a checkpoint to the matrices of a layer by role."""

import hashlib
from collections.abc import Callable, Iterator
from typing import overload

import torch

from engine.architecture.config import ModelConfig
from engine.architecture.families import all_tensors, layer_parts, layer_tensors, outer_tensors
from engine.checkpoint import Checkpoint
from engine.checkpoint.gguf_blocks import GgufBlocks, dequantize
from engine.errors import InputError
from engine.kernels.dtypes import DTYPES, name_of
from engine.kernels.w4.format import Packed, Spec, rows_of, unpack
from engine.kernels.w4.from_gguf import from_blocks
from engine.kernels.w4.tiled import Tiled

Weights = dict[str, torch.Tensor]  # role ("q", "q.bias", "attn_norm") -> tensor
Stored = GgufBlocks | Packed | torch.Tensor  # as it lies on disk


class Observed(Weights):
    """A layer's weights that show `observe` the role and the input (R, T, K) of every product."""

    def __init__(self, weights: Weights, observe: Callable[[str, torch.Tensor], None]) -> None:
        super().__init__(weights)
        self.observe = observe


def layer_weights(
    checkpoint: Checkpoint, config: ModelConfig, layer: int
) -> Iterator[tuple[str, Stored]]:
    """(role, its tensor as stored) of one layer (an original number), one in memory at a time.

    The one way to a layer's weights: what a checkpoint stores fused comes by part, as views. Each
    has the shape that the config asks for: it was checked when the checkpoint was opened (gate.py).
    """
    held: tuple[str, Stored] | None = None  # the fused tensor that was read last
    names = checkpoint.names()
    for role, part in layer_parts(config, layer).items():
        name, _ = part.stored(names)
        if part.fused is None or name == part.name:
            yield role, _stored(checkpoint, name)
            continue
        if held is None or held[0] != name:
            held = name, _stored(checkpoint, name)
        yield role, _rows(held[1], part.first, part.first + part.shape[0])


def load_layer(checkpoint: Checkpoint, config: ModelConfig, layer: int) -> Weights:
    """The same as tensors: the stored dtype, or float32 where the source is quantized."""
    found = {}
    for role, stored in layer_weights(checkpoint, config, layer):
        found[role] = stored if isinstance(stored, torch.Tensor) else values(stored)
    return found


def load_tensor(
    checkpoint: Checkpoint, config: ModelConfig, layer: int | None, role: str
) -> torch.Tensor:
    """A tensor as its family stores it ("qkv"), joined where the checkpoint has its parts apart.

    `layer` None: one from outside the layers.
    """
    if layer is None:
        return _read(checkpoint, outer_tensors(config)[role][0])
    name, shape = layer_tensors(config, layer)[role]
    parts = [part for part in layer_parts(config, layer).values() if part.fused == (name, shape)]
    if not parts or name in checkpoint.names():
        return _read(checkpoint, name)
    return torch.cat([_read(checkpoint, part.name) for part in parts])


def load_outer(checkpoint: Checkpoint, config: ModelConfig) -> Weights:
    """Embedding, final norm and head; a tied head is the embedding itself."""
    weights = {role: _read(checkpoint, name) for role, (name, _) in outer_tensors(config).items()}
    weights.setdefault("head", weights["embedding"])
    return weights


def outer_weights(checkpoint: Checkpoint, config: ModelConfig) -> Iterator[tuple[str, Stored]]:
    """(role, tensor as stored) of embedding, final norm and head; no "head" where it is tied."""
    for role, (name, _) in outer_tensors(config).items():
        yield role, _stored(checkpoint, name)


@overload
def packed_form(stored: GgufBlocks | Packed, where: str) -> Packed: ...
@overload
def packed_form(stored: torch.Tensor, where: str) -> torch.Tensor: ...
def packed_form(stored: Stored, where: str) -> Packed | torch.Tensor:
    """GGUF blocks in the packed format; InputError that begins with `where` for scales of NaN."""
    if not isinstance(stored, GgufBlocks):
        return stored
    try:
        return from_blocks(stored.type, stored.shape, stored.data, where)
    except ValueError as error:
        raise InputError(str(error)) from None


def tiled_form(blocks: GgufBlocks, where: str) -> Tiled:
    """The same as packed directories hold them, in the bits that they have; errors as above."""
    try:
        return Tiled.from_blocks(blocks.type, blocks.shape, blocks.data, where)
    except ValueError as error:
        raise InputError(str(error)) from None


def values(stored: Stored) -> torch.Tensor:
    """float32, whatever it is stored as."""
    if isinstance(stored, torch.Tensor):
        return stored.float()
    return dequantize(stored) if isinstance(stored, GgufBlocks) else unpack(stored)


def describe(stored: Stored) -> str:
    """In a few words: "float16", "Q4_1", "4 bits, group 64, symmetric"."""
    if isinstance(stored, torch.Tensor):
        return name_of(stored.dtype)
    if isinstance(stored, GgufBlocks):
        return stored.type
    if isinstance(stored, Tiled) and stored.gguf is not None:
        return stored.gguf
    spec = describe_spec(stored.spec)
    return spec if stored.perm is None else f"{spec}, activation order"


def describe_spec(spec: Spec) -> str:
    """Such as "4 bits, group 64, symmetric"."""
    words = [f"{spec.bits} bits", f"group {spec.group}" if spec.group else "a row", spec.scheme]
    if spec.scale_dtype != torch.float16:
        words.append(f"{spec.to_json()['scale_dtype']} scales")
    return ", ".join(words)


def is_quantized(checkpoint: Checkpoint) -> bool:
    """Whether matrices of its first layer are stored in 4 or 8 bits."""
    first = layer_weights(checkpoint, checkpoint.config, checkpoint.config.layers[0].layer)
    return any(not isinstance(stored, torch.Tensor) for _, stored in first)


def named_dtype(config: ModelConfig) -> str | None:
    """torch's name of the dtype that a model's config gives its weights; None: it gives none."""
    said = config.source.get("dtype") or config.source.get("torch_dtype")
    return None if said is None else str(said).removeprefix("torch.")


def half_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """A model's own 16 bits: the embedding's dtype or, where that is quantized, what the config
    names; float16 where that is neither float16 nor bfloat16. Reads no tensor."""
    embedding, _ = outer_tensors(checkpoint.config)["embedding"]
    name = checkpoint.dtype(embedding) or named_dtype(checkpoint.config)
    return torch.bfloat16 if name == "bfloat16" else torch.float16


def not_finite(checkpoint: Checkpoint) -> str | None:
    """The first tensor of its family that holds NaN or infinity, by name; reads them all."""
    found = (name for name, _ in all_tensors(checkpoint.config, checkpoint.names()))
    return next(
        (name for name in found if not checkpoint.read(name).float().isfinite().all()), None
    )


def lineage_hash(checkpoint: Checkpoint, config: ModelConfig) -> str:
    """Of the norm weights, which 16-bit, GGUF and packed copies of one model share exactly.

    The offset is added as llama.cpp's converter adds it (Gemma), in float32.
    """
    digest = hashlib.sha256()
    tensors = [outer_tensors(config)["norm"]]
    for layer in range(config.total_layers):
        roles = layer_tensors(config, layer)
        tensors += [roles[role] for role in sorted(roles) if role.endswith("norm")]
    for name, _ in tensors:
        weight = _read(checkpoint, name).float() + config.norm_offset
        digest.update(weight.numpy().tobytes())
    return digest.hexdigest()


def _rows(matrix: Stored, start: int, stop: int) -> Stored:
    """Rows start .. stop - 1, a view."""
    if isinstance(matrix, torch.Tensor):
        return matrix[start:stop]
    if isinstance(matrix, GgufBlocks):
        return GgufBlocks(matrix.type, (stop - start, matrix.shape[1]), matrix.data[start:stop])
    return rows_of(matrix, start, stop)


def _stored(checkpoint: Checkpoint, name: str) -> Stored:
    found = checkpoint.packed(name)
    return _read(checkpoint, name) if found is None else found


def _read(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """In the stored dtype where every backend has it, else in float32."""
    tensor = checkpoint.read(name)
    return tensor if name_of(tensor.dtype) in DTYPES else tensor.float()
