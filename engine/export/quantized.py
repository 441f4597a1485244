"""What directories of quantized matrices share: a file a layer, and what none of them can say."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch

from engine.architecture.config import ModelConfig
from engine.checkpoint import Checkpoint
from engine.checkpoint.gguf_blocks import GgufBlocks
from engine.checkpoint.weights import Stored, describe, half_dtype, packed_form
from engine.export import directory
from engine.export.tensors import Item, Unsupported, stored_tensors
from engine.kernels.w4.format import Packed, Spec
from engine.kernels.w4.from_gguf import BLOCKS


class QuantizedDirectory(ABC):
    """A Hugging Face directory whose layers are quantized by another project's rules.

    `look` is shown every tensor before anything is written, and raises Unsupported. Plain tensors
    keep their stored dtype unless `dtype` is given; so does, then, a quantized embedding or head
    that the format has no place for.
    """

    name: ClassVar[str]

    def __init__(
        self, checkpoint: Checkpoint, config: ModelConfig, dtype: torch.dtype | None
    ) -> None:
        self.checkpoint, self.config, self.dtype = checkpoint, config, dtype
        self.specs: dict[str, Spec | None] = {}  # module -> how its weight is quantized
        require_rope(config)

    def look(self, item: Item, stored: Stored) -> None:
        spec = spec_of(stored)
        if spec is not None and self.written_plain(item):
            if self.dtype is None:
                tied = "tied embedding" if self.config.tied else item.role
                raise Unsupported(
                    f"{item.source}: a quantized {tied} ({describe(stored)}) does not load; with "
                    f"--dtype it is written in 16 bits"
                )
            spec = None
        if spec is not None:
            self.require(item, stored, spec)
        if len(item.shape) == 2 and item.role != "embedding":
            self.specs[item.module] = spec

    def ready(self) -> None:
        self.quantization()

    def written_plain(self, item: Item) -> bool:
        """What no loader of the format takes quantized."""
        return item.role == "embedding"

    @abstractmethod
    def require(self, item: Item, stored: Stored, spec: Spec) -> None:
        """Raises Unsupported for a matrix that the format cannot hold."""

    @abstractmethod
    def quantization(self) -> dict[str, Any]:
        """`quantization_config`, once every tensor was looked at."""

    @abstractmethod
    def encode(self, packed: Packed) -> dict[str, torch.Tensor]:
        """Part name -> tensor of one matrix."""

    def beside(self) -> dict[str, str]:
        """Text files besides config.json."""
        return {}

    def write(self, out: Path, progress: Callable[[int, int], None] | None) -> None:
        """A file a layer, then one of the other tensors; a killed run goes on behind the last."""
        described = directory.sliced_config(self.config, self.dtype or half_dtype(self.checkpoint))
        described |= {"quantization_config": self.quantization()}
        partial = directory.begin(
            out, self.checkpoint.path, self.config, described, str(self.dtype)
        )
        slots = [*range(len(self.config.layers)), None]
        names = [directory.shard_name(index, len(slots)) for index in range(len(slots))]
        for index, (slot, name) in enumerate(zip(slots, names, strict=True)):
            if not (partial / name).exists():
                directory.save_tensors(partial / name, self._encoded(slot))
            if progress is not None:
                progress(index + 1, len(slots))
        directory.index_shards(partial, names)
        for name, text in self.beside().items():
            directory.write_text(partial / name, text)
        directory.finish(partial, out)

    def _encoded(self, slot: int | None) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for item, stored in stored_tensors(self.checkpoint, self.config, slot):
            where = f"{self.checkpoint.path}: {item.source}"
            if isinstance(stored, torch.Tensor) or self.written_plain(item):
                found[item.name] = directory.plain(stored, self.dtype, where)
            else:
                parts = self.encode(packed_form(stored, where))
                found |= {f"{item.module}.{part}": tensor for part, tensor in parts.items()}
        return {name: tensor.contiguous() for name, tensor in found.items()}


def spec_of(stored: Stored) -> Spec | None:
    """How a matrix is quantized once it is in the packed format; None: it is not."""
    if isinstance(stored, torch.Tensor):
        return None
    return BLOCKS[stored.type].spec if isinstance(stored, GgufBlocks) else stored.spec


def as_half(scales: torch.Tensor) -> torch.Tensor | None:
    """The same numbers as float16; None where one of them is not one."""
    half = scales.half()
    return half if torch.equal(half.float(), scales.float()) else None


def require_rope(config: ModelConfig) -> None:
    """Unsupported for frequencies that a GGUF lists and that no config.json has a name for."""
    if any(rope.kind == "divisors" for rope in config.ropes):
        raise Unsupported("its rotary frequencies follow no rule that a config.json names")


def require_scheme(item: Item, spec: Spec, *allowed: str) -> None:
    if spec.scheme not in allowed:
        raise Unsupported(
            f"{item.source}: expected scheme {' or '.join(allowed)}, found {spec.scheme} "
            f"(`engine quantize --scheme {allowed[0]}` makes one that it holds)"
        )
