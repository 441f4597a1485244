"""The compiled extensions `engine._cpu` and `engine._cuda`, each loaded once, on first use."""

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from engine.kernels.dtypes import name_of

if TYPE_CHECKING:
    import torch


@cache
def _load(name: str) -> ModuleType | str:
    """The module `engine._<name>`, or the reason why it does not load."""
    try:
        return import_module(f"engine._{name}")
    except ImportError as error:
        return str(error)


def load(name: str) -> ModuleType:
    """The extension "cpu" or "cuda"; ImportError with the first attempt's reason."""
    found = _load(name)
    if isinstance(found, str):
        raise ImportError(f"engine._{name} does not load: {found}")
    return found


def span(tensor: "torch.Tensor | None") -> tuple[int, int, str, str] | None:
    """A tensor's memory as the extensions take it: (address, elements from there to its last one,
    dtype by name, device). They refuse what does not hold what they are to read or write."""
    if tensor is None:
        return None
    sizes, strides = tensor.shape, tensor.stride()  # the latter is an error for a sparse one
    steps = ((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    count = 0 if 0 in sizes else 1 + sum(steps)
    return tensor.data_ptr() if count else 0, count, name_of(tensor.dtype), tensor.device.type


def error(name: str) -> str | None:
    """Why the extension "cpu" or "cuda" does not load; None when it does."""
    found = _load(name)
    return found if isinstance(found, str) else None
