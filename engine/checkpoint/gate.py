"""The gate: what stands behind it may trust a checkpoint's tensors."""

import warnings
from collections.abc import Collection
from typing import TYPE_CHECKING

from engine.architecture.families import all_tensors, outer_tensors
from engine.errors import InputError

if TYPE_CHECKING:
    from engine.checkpoint import Checkpoint

HEAD = "lm_head.weight"


def check_tensors(checkpoint: "Checkpoint") -> None:
    """InputError unless every tensor that the family names is there, once, in the config's shape,
    and holds floats; matrices may be quantized.

    From the headers alone, of every layer, whatever is run later. Only a head beside an embedding
    that the config ties it to is read, and biases that the config does not speak of.
    """
    tensors = dict(all_tensors(checkpoint.config, checkpoint.names()))
    for name, shape in tensors.items():
        _check(checkpoint, name, shape)
    _tell_of_biases(checkpoint, tensors)
    beyond = f"model.layers.{checkpoint.config.total_layers}."
    more = next((name for name in checkpoint.names() if name.startswith(beyond)), None)
    if more is not None:
        warnings.warn(
            f"{checkpoint.path}: num_hidden_layers is {checkpoint.config.total_layers}, and the "
            f"layers behind these are left out ({more})",
            stacklevel=2,
        )
    if checkpoint.config.tied and HEAD in checkpoint.names():
        _check_tied(checkpoint)


def _tell_of_biases(checkpoint: "Checkpoint", tensors: Collection[str]) -> None:
    """A warning of biases beside matrices in `tensors` that have none by the config: left out, as
    by transformers. GPTQ directories have such of zeros."""
    beside = (name.removesuffix("weight") + "bias" for name in tensors)
    more = sorted({*beside}.intersection(checkpoint.names()).difference(tensors))
    name = next((name for name in more if checkpoint.read(name).float().any()), None)
    if name is not None:
        warnings.warn(
            f"{checkpoint.path}: {name} is left out: by its config the model has no such bias",
            stacklevel=3,
        )


def _check_tied(checkpoint: "Checkpoint") -> None:
    """InputError where the head is not the embedding, as the config says it is: transformers 5
    takes the head then, transformers 4 the embedding.
    """
    name, shape = outer_tensors(checkpoint.config)["embedding"]
    _check(checkpoint, HEAD, shape)
    parts = (checkpoint.read(each).split(1024) for each in (HEAD, name))
    same = all(head.float().equal(rows.float()) for head, rows in zip(*parts, strict=True))
    checkpoint.forget()
    if not same:
        raise InputError(
            f"{checkpoint.path}: tie_word_embeddings is true, but {HEAD} differs from {name}; "
            "set it to false in config.json to use that head, or remove the tensor"
        )


def _check(checkpoint: "Checkpoint", name: str, shape: tuple[int, ...]) -> None:
    found = tuple(checkpoint.shape(name))  # raises for an absent tensor
    if found != shape:
        raise InputError(f"{checkpoint.path}: {name}: expected shape {shape}, found {found}")
    dtype = checkpoint.dtype(name)
    if dtype is None and len(shape) == 1:
        raise InputError(f"{checkpoint.path}: {name}: expected floats, found a quantized vector")
    if dtype is not None and "float" not in dtype:
        raise InputError(f"{checkpoint.path}: {name}: expected floats, found {dtype}")
    if dtype is not None and dtype.startswith("float8"):
        _check_unscaled(checkpoint, name, dtype)


def _check_unscaled(checkpoint: "Checkpoint", name: str, dtype: str) -> None:
    """InputError for 8-bit floats beside a scale that no configuration speaks of (modelopt's, say,
    describes them in a file of its own): as they are, they stand for other weights."""
    module = name.removesuffix("weight")
    beside = (each.removeprefix(module) for each in checkpoint.names() if each.startswith(module))
    scale = min((part for part in beside if "scale" in part), default=None)
    if scale is not None:
        raise InputError(
            f"{checkpoint.path}: {name}: {dtype} beside a scale ({scale}) is not read; take the "
            "model in 16 bits, or in 4 as GGUF, GPTQ, AWQ or compressed-tensors"
        )
