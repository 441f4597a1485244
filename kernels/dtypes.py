"""The dtypes of activations, unquantized weights and scales by name: those all backends have."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "float16", "bfloat16")


def name_of(dtype: "torch.dtype") -> str:
    """torch.float16 -> "float16"."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> "torch.dtype":
    """The dtype that torch has under this name; AttributeError where it has none."""
    import torch

    return getattr(torch, name)
