"""`export()`: a model in the format of another engine, or the reason why it has no place there."""

import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import torch

from engine.architecture.config import ModelConfig
from engine.checkpoint import Checkpoint
from engine.checkpoint.gguf import GgufCheckpoint
from engine.checkpoint.quantized import QuantizedCheckpoint
from engine.checkpoint.weights import Stored
from engine.errors import InputError, check_choice
from engine.export import copied, gguf_copy, hf
from engine.export.compressed_tensors import CompressedTensors
from engine.export.gguf import Gguf
from engine.export.gptq import Gptq
from engine.export.quantized import require_rope
from engine.export.tensors import Item, Unsupported, all_stored_tensors
from engine.kernels.dtypes import name_of
from engine.scratch import check_new

Progress = Callable[[int, int], None]


class Format(Protocol):
    """Made for one model; its constructor, `look` and `ready` raise Unsupported."""

    def look(self, item: Item, stored: Stored) -> None:
        """Is shown every tensor before anything is written."""

    def ready(self) -> None:
        """Has seen them all."""

    def write(self, out: Path, progress: Progress | None) -> None: ...


class HuggingFace:
    """16 bits, which hold any model that has a config.json."""

    def __init__(
        self, checkpoint: Checkpoint, config: ModelConfig, dtype: torch.dtype | None
    ) -> None:
        self.checkpoint, self.config, self.dtype = checkpoint, config, dtype
        require_rope(config)

    def look(self, item: Item, stored: Stored) -> None: ...

    def ready(self) -> None: ...

    def write(self, out: Path, progress: Progress | None) -> None:
        hf.prune(self.checkpoint, self.config, out, dtype=self.dtype, progress=progress)


# In the order in which they are tried for a model that another one cannot hold.
FORMATS: dict[str, Callable[[Checkpoint, ModelConfig, torch.dtype | None], Format]] = {
    "compressed-tensors": CompressedTensors,
    "gptq": Gptq,
    "gguf": Gguf,
    "hf": HuggingFace,
}


def export(
    checkpoint: Checkpoint,
    config: ModelConfig,
    out: Path,
    to: str,
    *,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> None:
    """Writes the layers that `config` keeps to `out`, in one of FORMATS.

    "hf" rounds the values of quantized matrices to 16 bits, the others hold them to the bit. `out`
    is a new directory, or a file for "gguf": written beside, a layer in memory at a time, taken up
    where a killed run was, and renamed at the end. `dtype` is of what is not quantized: the stored
    one if not given (in 16 bits for "hf"). InputError for a model that the format cannot hold, with
    the reason and the nearest format that can.
    """
    out = Path(out)
    check_choice("to", to, FORMATS)
    check_new(out)
    try:
        with warnings.catch_warnings(record=True) as lost:
            chosen = _looked(to, checkpoint, config, dtype)
    except Unsupported as error:  # then nothing is lost
        reason = f"{checkpoint.path}: {to} cannot hold it: {error}"
    else:
        for each in lost:
            warnings.warn(each.message, stacklevel=2)
        return chosen.write(out, progress)
    for other in FORMATS:
        # Also one whose library is not here; what it would lose is of no concern yet.
        with suppress(InputError), warnings.catch_warnings(action="ignore"):
            if other != to and _looked(other, checkpoint, config, dtype):
                reason = f"{reason}; the nearest format that can is {other}"
                break
    raise InputError(reason)


def prune(
    checkpoint: Checkpoint,
    config: ModelConfig,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> None:
    """Writes the layers that `config` keeps in the format and the bits that they have.

    A GGUF becomes a GGUF, a quantized directory one of the same kind, both byte for byte; any
    other directory one of 16 bits, or of `dtype`, which is of that alone.
    """
    out = Path(out)
    kept = isinstance(checkpoint, GgufCheckpoint | QuantizedCheckpoint)
    if kept and dtype is not None:
        raise InputError(
            f"dtype: {checkpoint.path} keeps the bits that it has; `engine export --to hf` "
            f"writes it in {name_of(dtype)}"
        )
    if isinstance(checkpoint, GgufCheckpoint):
        try:
            gguf_copy.copy(checkpoint, config, out, progress)
        except Unsupported as error:
            raise InputError(f"{checkpoint.path}: {error}; `engine export --to hf` can") from None
    elif kept:
        copied.prune(checkpoint, config, out, progress=progress)
    else:
        hf.prune(checkpoint, config, out, dtype=dtype, progress=progress)


def _looked(
    to: str, checkpoint: Checkpoint, config: ModelConfig, dtype: torch.dtype | None
) -> Format:
    """The format, once it has seen every tensor; Unsupported where it cannot hold one."""
    made = FORMATS[to](checkpoint, config, dtype)
    if to != "hf":
        for item, stored in all_stored_tensors(checkpoint, config):
            made.look(item, stored)
        made.ready()
    return made
