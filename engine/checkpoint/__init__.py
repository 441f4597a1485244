"""Checkpoints: tensors under their Hugging Face names, whatever file they lie in."""

import warnings
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from engine.architecture.layers import kept_layers
from engine.artifacts import Plan
from engine.errors import InputError

if TYPE_CHECKING:
    import torch

    from engine.architecture.config import ModelConfig
    from engine.checkpoint.gguf_blocks import GgufBlocks
    from engine.kernels.w4.format import Packed, Spec


class Checkpoint(Protocol):
    """Weights on disk, read one tensor at a time; what is not asked for is never read.

    Every method that takes a name raises InputError when the checkpoint lacks that tensor.
    """

    path: Path
    config: "ModelConfig"

    def names(self) -> Collection[str]:
        """Every tensor, under its Hugging Face name ("model.layers.3.self_attn.q_proj.weight")."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> str | None:
        """torch's name; None where the tensor is quantized."""

    def nbytes(self, name: str) -> int:
        """Bytes on disk."""

    def read(self, name: str) -> "torch.Tensor":
        """The stored dtype, or float32 where the source is quantized.

        A view of the mapped file where the layout permits: not to be written to.
        """

    def packed(self, name: str) -> "GgufBlocks | Packed | None":
        """A quantized matrix as stored: GGUF blocks, or what a Hugging Face directory holds.

        None where it is not quantized, or stored in a way that no packed form follows.
        """

    def spec(self, name: str) -> "Spec | None":
        """Of the packed form, as far as that is known without making it."""

    def forget(self) -> None:
        """Gives the pages read so far back to the system's cache; views of them stay good."""


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a Hugging Face directory (safetensors), a .gguf file, or an adapter beside its base.

    Every tensor that its family names is there then, in the shape that the config asks for, and
    holds floats or is a quantized matrix (gate.py): nobody else checks that.

    Raises:
        InputError: none of these, damaged, or of an architecture that is not supported.
    """
    from engine.checkpoint.gate import check_tensors

    opened = open_unchecked(path)
    check_tensors(opened)
    return opened


def open_unchecked(path: Path) -> Checkpoint:
    """The same for files that need not hold a whole model; no runtime may be given them."""
    from engine.checkpoint.adapter import is_adapter, open_adapted

    path = Path(path)
    if is_adapter(path):
        return open_adapted(path)
    if path.is_dir():
        from engine.checkpoint.safetensors import SafetensorsCheckpoint, quantization_config

        stored = SafetensorsCheckpoint(path)
        quantization = quantization_config(path, stored.config.source)
        if quantization is None:
            return stored
        from engine.checkpoint.quantized import QuantizedCheckpoint

        return QuantizedCheckpoint(stored, quantization)
    if path.suffix == ".gguf" or not path.exists():
        from engine.checkpoint.gguf import GgufCheckpoint

        return GgufCheckpoint(path)
    raise InputError(f"{path}: expected a Hugging Face directory or a .gguf file")


def stored_sizes(path: Path) -> "tuple[ModelConfig, dict[str, int]]":
    """(config, bytes of every tensor on disk), without torch for a directory; reads headers alone.

    The tensors of a directory have the names they are stored under, companions of quantized ones
    too; those of a GGUF their Hugging Face names.
    """
    from engine.checkpoint.adapter import is_adapter

    if path.is_dir() and not is_adapter(path):
        from engine.checkpoint.safetensors import SafetensorsCheckpoint

        opened: Checkpoint = SafetensorsCheckpoint(path)
    else:
        opened = open_checkpoint(path)
    return opened.config, {name: opened.nbytes(name) for name in opened.names()}


def choose_layers(
    checkpoint: Checkpoint,
    drop: str | Iterable[int] | Plan | None = None,
    keep: str | Iterable[int] | None = None,
) -> "ModelConfig":
    """The checkpoint's config with the layers that stay.

    A Plan made on another architecture is an InputError; on other weights of the same one, a
    warning. Bits do not matter: a plan made on 16-bit weights drives a 4-bit copy.
    """
    config = checkpoint.config
    if not isinstance(drop, Plan):
        return config.keep(kept_layers(config.total_layers, drop, keep))
    if keep is not None:
        raise InputError("a plan and keep exclude each other; give one of them")
    drop.check(config.architecture_hash, config.total_layers, str(checkpoint.path))
    from engine.checkpoint.weights import lineage_hash

    if drop.lineage != lineage_hash(checkpoint, config):
        warnings.warn(
            f"the plan was made on other weights ({drop.model}) than {checkpoint.path} holds",
            stacklevel=2,
        )
    return config.keep(drop.keep)
