"""A packed matrix in the layout that the CPU kernels read, as packed directories hold it.

They multiply it where it lies, in a mapped file say; whoever else reads it finds the arrays of
`Packed`, restored bit for bit. GGUF's types of five and six bits lie in six bits a weight under
their own scales, and are restored as `from_gguf.from_blocks` makes them. The layout is drawn in
README.md and told in csrc/cpu/w4_matmul.h.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from engine.kernels import native
from engine.kernels.dispatch import BackendUnavailable
from engine.kernels.w4.format import (
    IQ4_NL,
    SHARED,
    SUPER,
    Packed,
    Spec,
    check_tensors,
    is_permutation,
    validate,
    zeros,
)
from engine.kernels.w4.from_gguf import BLOCKS, check_blocks, from_blocks

TILE_ROWS = 16
ALIGN_BYTES = 64  # of tiles that are multiplied where they lie


# How GGUF types of other bits than 4 and 8 lie in tiles: as a Spec says it, which has no such bits.
SIXES = {
    "Q5_0": {"bits": 6, "group": 32, "scheme": "symmetric", "scale_dtype": "float16"},
    "Q5_1": {"bits": 6, "group": 32, "scheme": "minimum", "scale_dtype": "float16"},
    "Q5_K": {"bits": 6, "group": 32, "scheme": "kquant", "scale_dtype": "float16"},
    "Q6_K": {"bits": 6, "group": 16, "scheme": "stepped", "scale_dtype": "float16"},
}


class Tiled(Packed):
    """Stores `tiles` (ceil(N / 16), bytes) uint8, and beside them `supers` (ceil(N / 16),
    ceil(K / 256), 2, 16) float16 of a kquant (Q6_K: without the 2), `codebook` and `perm`. Its
    other fields, and supers as `Packed` has them, are restored together when one of them is asked
    for. `gguf`: one of SIXES, whose bits the tiles are; `spec` is of what is restored. None: `spec`
    is of both."""

    stored: dict[str, torch.Tensor]
    gguf: str | None

    def __init__(
        self,
        spec: Spec,
        shape: tuple[int, int],
        stored: Mapping[str, torch.Tensor],
        name: str = "packed weight",
        gguf: str | None = None,
    ) -> None:
        """Raises ValueError or TypeError, one sentence that begins with `name`, unless `stored` is
        what the others ask for; reads no more of the tiles than their size."""
        self.__dict__.update(spec=spec, shape=shape, stored=dict(stored), gguf=gguf)
        tiles, (n, k) = stored["tiles"], shape
        count, bits = -(-n // TILE_ROWS), tiled_fields(spec, gguf)["bits"]
        if gguf is not None:
            _check_gguf(gguf, spec, k, name)
        # A K that the tiles cannot hold is refused before its bytes are counted.
        fits = tiles.dim() == 2 and len(tiles) == count and k * bits * 2 <= tiles.shape[1]
        width = tile_bytes(spec, k, gguf) if fits else k * bits * 2
        expected = expected_parts(spec, shape, gguf) | {"tiles": ((count, width), torch.uint8)}
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
        stored = {
            "tiles": torch.zeros(
                -(-n // TILE_ROWS), tile_bytes(spec, k), dtype=torch.uint8, device="cpu"
            )
        }
        for part, (shape, dtype) in expected_parts(spec, packed.shape).items():
            stored[part] = torch.zeros(shape, dtype=dtype, device="cpu")
        parts = packed.tensors()
        stored |= {part: parts[part].clone() for part in SHARED if part in parts}
        tiled, cpu = cls(spec, packed.shape, stored), native.load("cpu")
        tiled.borrowed().fill(cpu.Packed(**packed.native_fields()), cpu.pool_threads())
        return tiled

    @classmethod
    def from_blocks(
        cls, type_name: str, shape: tuple[int, int], data: torch.Tensor, name: str = "tensor"
    ) -> "Tiled":
        """(N, K) of GGUF type `type_name`, as `from_gguf.from_blocks`, whose errors these are."""
        spec = check_blocks(type_name, shape, data, name).spec
        gguf, (n, k) = type_name if type_name in SIXES else None, shape
        width = tile_bytes(spec, k, gguf)
        stored = {"tiles": torch.zeros(-(-n // TILE_ROWS), width, dtype=torch.uint8, device="cpu")}
        for part, (size, dtype) in expected_parts(spec, shape, gguf).items():
            stored[part] = torch.zeros(size, dtype=dtype, device="cpu")
        if "codebook" in stored:
            stored["codebook"] = torch.tensor(IQ4_NL, dtype=torch.float32, device="cpu")
        tiled = cls(spec, shape, stored, name, gguf)
        cpu, data = native.load("cpu"), data.contiguous()
        threads = cpu.pool_threads()
        if not cpu.fill_gguf(tiled.borrowed(), type_name, native.span(data), 0, threads):
            from_blocks(type_name, shape, data, name)  # says which scale is NaN or Inf
        return tiled

    def borrowed(self) -> Any:
        """The engine._cpu.TiledMatrix of the tiles where they lie, or of a copy where they do not
        begin on a multiple of 64 bytes. It keeps them alive."""
        stored = dict(self.stored)
        if stored["tiles"].data_ptr() % ALIGN_BYTES:
            stored["tiles"] = stored["tiles"].clone()
        spans = {part: native.span(tensor) for part, tensor in stored.items()}
        (n, k), kind = self.shape, tiled_fields(self.spec, self.gguf)
        matrix = native.load("cpu").TiledMatrix(n=n, k=k, **kind, **spans)
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


def _check_gguf(gguf: str, spec: Spec, k: int, name: str) -> None:
    block = BLOCKS[gguf]
    if spec != block.spec:
        raise ValueError(
            f"{name}: {gguf} is restored as {block.spec.to_json()}, found {spec.to_json()}"
        )
    if k % block.weights:
        raise ValueError(f"{name}: {gguf} needs K in blocks of {block.weights}, found K={k}")


def tiled_fields(spec: Spec, gguf: str | None = None) -> dict[str, Any]:
    """What lies in the tiles, as keyword arguments of the native functions."""
    return spec.native_fields() if gguf is None else SIXES[gguf]


def expected_parts(
    spec: Spec, shape: tuple[int, int], gguf: str | None = None
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of what is stored beside the tiles, the optional perm aside."""
    n, k = shape
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    scheme, count = tiled_fields(spec, gguf)["scheme"], (-(-n // TILE_ROWS), -(-k // SUPER))
    if scheme == "kquant":
        expected["supers"] = ((*count, 2, TILE_ROWS), torch.float16)
    if scheme == "stepped":
        expected["supers"] = ((*count, TILE_ROWS), torch.float16)
    if spec.scheme == "codebook":
        expected["codebook"] = ((16,), torch.float32)
    return expected


def tile_bytes(spec: Spec, k: int, gguf: str | None = None) -> int:
    """Of 16 rows of K weights: a multiple of 64."""
    if (reason := native.error("cpu")) is not None:
        raise BackendUnavailable(f"packed weights need engine._cpu, which does not load: {reason}")
    return native.load("cpu").tile_bytes(k=k, **tiled_fields(spec, gguf))
