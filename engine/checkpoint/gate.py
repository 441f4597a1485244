"""The gate: what stands behind it may trust a checkpoint's tensors."""

from typing import TYPE_CHECKING

from engine.architecture.families import all_tensors
from engine.errors import InputError

if TYPE_CHECKING:
    from engine.checkpoint import Checkpoint


def check_tensors(checkpoint: "Checkpoint") -> None:
    """InputError unless every tensor that the family names is there, once, in the config's shape,
    and holds floats; matrices may be quantized.

    From the headers alone, of every layer, whatever is run later.
    """
    for name, shape in all_tensors(checkpoint.config, checkpoint.names()):
        _check(checkpoint, name, shape)


def _check(checkpoint: "Checkpoint", name: str, shape: tuple[int, ...]) -> None:
    found = tuple(checkpoint.shape(name))  # raises for an absent tensor
    if found != shape:
        raise InputError(f"{checkpoint.path}: {name}: expected shape {shape}, found {found}")
    dtype = checkpoint.dtype(name)
    if dtype is None and len(shape) == 1:
        raise InputError(f"{checkpoint.path}: {name}: expected floats, found a quantized vector")
    if dtype is not None and "float" not in dtype:
        raise InputError(f"{checkpoint.path}: {name}: expected floats, found {dtype}")
