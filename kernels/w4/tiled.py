"""A packed matrix in the layout that the CPU kernels read, as packed directories hold it.

They multiply it where it lies, in a mapped file say; whoever else reads it finds the arrays of
`Packed`, restored bit for bit. The layout is drawn in README.md and told in csrc/cpu/w4_matmul.h.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from engine.kernels import native
from engine.kernels.w4.format import (
    SHARED,
    SUPER,
    Packed,
    Spec,
    check_tensors,
    is_permutation,
    validate,
    zeros,
)

TILE_ROWS = 16
ALIGN_BYTES = 64  # of tiles that are multiplied where they lie


class Tiled(Packed):
    """Stores `tiles` (ceil(N / 16), bytes) uint8, and beside them `supers` (ceil(N / 16),
    ceil(K / 256), 2, 16) float16 of a kquant, `codebook` and `perm`. Its other fields, and supers
    as `Packed` has them, are restored together when one of them is asked for."""

    stored: dict[str, torch.Tensor]

    def __init__(
        self,
        spec: Spec,
        shape: tuple[int, int],
        stored: Mapping[str, torch.Tensor],
        name: str = "packed weight",
    ) -> None:
        """Raises ValueError or TypeError, one sentence that begins with `name`, unless `stored` is
        what spec and shape ask for; reads no more of the tiles than their size."""
        self.__dict__.update(spec=spec, shape=shape, stored=dict(stored))
        tiles, (n, k) = stored["tiles"], shape
        count = -(-n // TILE_ROWS)
        # A K that the tiles cannot hold is refused before its bytes are counted.
        fits = tiles.dim() == 2 and len(tiles) == count and k * spec.bits * 2 <= tiles.shape[1]
        width = tile_bytes(spec, k) if fits else k * spec.bits * 2
        expected = expected_parts(spec, shape) | {"tiles": ((count, width), torch.uint8)}
        if "perm" in stored:
            expected["perm"] = ((k,), torch.int32)
        check_tensors(stored, expected, torch.device("cpu"), name)
        if self.perm is not None and not is_permutation(self.perm):
            raise ValueError(f"{name}: perm must hold each of 0..{k - 1} once")
        if self.codebook is not None and not self.codebook.isfinite().all():
            raise ValueError(f"{name}: codebook must be finite, found NaN or Inf")

    @classmethod
    def from_packed(cls, packed: Packed) -> "Tiled":
        """A copy; `packed` itself where it is one. Raises what `validate` raises."""
        if isinstance(packed, Tiled):
            return packed
        packed, spec, (n, k) = validate(packed).to("cpu"), packed.spec, packed.shape
        stored = {"tiles": torch.zeros(-(-n // TILE_ROWS), tile_bytes(spec, k), dtype=torch.uint8)}
        for part, (shape, dtype) in expected_parts(spec, packed.shape).items():
            stored[part] = torch.zeros(shape, dtype=dtype)
        parts = packed.tensors()
        stored |= {part: parts[part] for part in SHARED if part in parts}
        tiled, cpu = cls(spec, packed.shape, stored), native.load("cpu")
        tiled.borrowed().fill(cpu.Packed(**packed.native_fields()), cpu.pool_threads())
        return tiled

    def borrowed(self) -> Any:
        """The engine._cpu.TiledMatrix of the tiles where they lie, or of a copy where they do not
        begin on a multiple of 64 bytes. It keeps them alive."""
        stored = dict(self.stored)
        if stored["tiles"].data_ptr() % ALIGN_BYTES:
            stored["tiles"] = stored["tiles"].clone()
        spans = {part: native.span(tensor) for part, tensor in stored.items()}
        n, k = self.shape
        matrix = native.load("cpu").TiledMatrix(n=n, k=k, **self.spec.native_fields(), **spans)
        matrix.stored = stored
        return matrix

    @cached_property
    def restored(self) -> Packed:
        """As anybody reads it, in memory of its own."""
        cpu, packed = native.load("cpu"), zeros(self.spec, self.shape, "cpu")
        if self.perm is not None:
            packed = replace(packed, perm=torch.zeros_like(self.perm))
        self.borrowed().restore(cpu.Packed(**packed.native_fields()), cpu.pool_threads())
        return packed

    @property
    def codes(self) -> torch.Tensor:
        return self.restored.codes

    @property
    def scales(self) -> torch.Tensor:
        return self.restored.scales

    @property
    def zeros(self) -> torch.Tensor | None:
        return self.restored.zeros

    @property
    def mins(self) -> torch.Tensor | None:
        return self.restored.mins

    @property
    def supers(self) -> torch.Tensor | None:
        return self.restored.supers

    @property
    def codebook(self) -> torch.Tensor | None:
        return self.stored.get("codebook")

    @property
    def perm(self) -> torch.Tensor | None:
        return self.stored.get("perm")

    @property
    def device(self) -> torch.device:
        return self.stored["tiles"].device

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.stored.values())


def expected_parts(
    spec: Spec, shape: tuple[int, int]
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of what is stored beside the tiles, the optional perm aside."""
    n, k = shape
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    if spec.scheme == "kquant":
        expected["supers"] = ((-(-n // TILE_ROWS), -(-k // SUPER), 2, TILE_ROWS), torch.float16)
    if spec.scheme == "codebook":
        expected["codebook"] = ((16,), torch.float32)
    return expected


def tile_bytes(spec: Spec, k: int) -> int:
    """Of 16 rows of K weights: a multiple of 64."""
    return native.load("cpu").tile_bytes(k=k, **spec.native_fields())
