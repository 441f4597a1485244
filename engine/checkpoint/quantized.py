"""Hugging Face directories with quantized matrices, each under its plain name.

The tensors present say which modules are quantized, `quantization_config` says how: a module's
parts (`q_proj.qweight`, `q_proj.scales`, ...) appear as the one name `q_proj.weight`.
"""

from collections.abc import Callable, Collection
from typing import Any

import torch

from engine.checkpoint.methods import METHODS, Parts
from engine.checkpoint.safetensors import SafetensorsCheckpoint
from engine.errors import InputError
from engine.kernels.w4.format import Packed, Spec


class QuantizedCheckpoint:
    """A `Checkpoint` over the tensors of another.

    Raises InputError for a method, format or bit width that cannot be read.
    """

    def __init__(self, stored: SafetensorsCheckpoint, quantization: dict[str, Any]) -> None:
        self.path, self.config, self._stored = stored.path, stored.config, stored
        name = quantization.get("quant_method")
        if name not in tuple(METHODS):
            raise InputError(
                f"{self.path}: quant_method must be one of {tuple(METHODS)}, found {name!r}"
            )
        self._parts = Parts(stored)
        self._method = METHODS[name](self._parts, quantization)
        marker, names = f".{self._method.marker}", list(stored.names())
        modules = [name.removesuffix(marker) for name in names if name.endswith(marker)]
        self._modules = {f"{module}.weight": module for module in modules}
        owned = {f"{module}.{part}" for module in modules for part in self._method.parts}
        self._names = frozenset(names) - owned | self._modules.keys()

    def names(self) -> Collection[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        module = self._modules.get(name)
        if module is None:
            return self._stored.shape(name)
        return self._named(self._method.shape, module)

    def dtype(self, name: str) -> str | None:
        return None if name in self._modules else self._stored.dtype(name)

    def nbytes(self, name: str) -> int:
        module = self._modules.get(name)
        if module is None:
            return self._stored.nbytes(name)
        return sum(self._parts.nbytes(module, part) for part in self._method.parts)

    def read(self, name: str) -> torch.Tensor:
        module = self._modules.get(name)
        if module is None:
            return self._stored.read(name)
        return self._named(self._method.read, module)

    def packed(self, name: str) -> Packed | None:
        """The codes and scales as stored; None where not quantized or where the packed format
        cannot follow the source's blocks (NF4 that straddles rows)."""
        module = self._modules.get(name)
        if module is None:
            self._stored.packed(name)  # raises where there is no such tensor
            return None
        return self._named(self._method.packed, module)

    def spec(self, name: str) -> Spec | None:
        module = self._modules.get(name)
        return None if module is None else self._named(self._method.spec, module)

    def forget(self) -> None:
        self._stored.forget()

    def _named(self, load: Callable[[str], Any], module: str) -> Any:
        try:
            return load(module)
        except InputError:
            raise
        except (TypeError, ValueError) as error:  # kernels.w4 names the module and the part
            raise InputError(f"{self.path}: {error}") from None
