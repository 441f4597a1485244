"""Codes in the order that GPUs read: 64-byte chunks of a row, one for the 4 lanes of a quad.

A tensor core takes a row's weights from the 4 lanes of a quad: of every 16, lane t has weights
2 t + (0, 1, 8, 9). A chunk holds 128 weights (4 bits) or 64 (8 bits); lane t reads its bytes
16 t .. 16 t + 15 in one load: word s of these 4 words holds

    4 bits: weights 32 s + 2 t + (0, 1, 8, 9) and 32 s + 16 + 2 t + (0, 1, 8, 9), as nibbles in
            the order 0 2 4 6 1 3 5 7, so that `word >> 4 i & 0x000f000f` is weights 2 i, 2 i + 1
    8 bits: weights 16 s + 2 t + (0, 1, 8, 9), a byte each

of the chunk. Rows stay apart, so stacking matrices is `torch.cat`; all else stays as packed.
"""

import math
from dataclasses import dataclass, fields

import torch
from torch.nn.functional import pad

from engine.kernels.w4.format import Packed, Spec, check_tensors, expected_tensors

CHUNK_BYTES = 64
NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)  # from the lowest


@dataclass(frozen=True, eq=False)
class GpuMatrix:
    """A packed matrix (N, K) with its codes in GPU order; the other tensors as in `Packed`.

    Kernels read these addresses by the shape alone: raises ValueError or TypeError where a tensor
    is absent, of another shape or dtype, not contiguous, or on another device than the codes.
    """

    spec: Spec
    shape: tuple[int, int]  # (N, K)
    codes: torch.Tensor  # (N, CHUNK_BYTES * chunks) uint8, padded with zero codes
    scales: torch.Tensor
    zeros: torch.Tensor | None = None
    mins: torch.Tensor | None = None
    supers: torch.Tensor | None = None
    codebook: torch.Tensor | None = None
    perm: torch.Tensor | None = None

    def __post_init__(self) -> None:
        expected = parts_of(self.spec, self.shape)
        if self.perm is not None:
            expected["perm"] = ((self.shape[1],), torch.int32)
        check_tensors(self.tensors(), expected, self.codes.device, "GPU matrix")

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors present, by field name."""
        found = {field.name: getattr(self, field.name) for field in fields(self)[2:]}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())


def codes_shape(spec: Spec, shape: tuple[int, int]) -> tuple[int, int]:
    """(N, CHUNK_BYTES * chunks): of the codes of a matrix (N, K) in GPU order."""
    n, k = shape
    return n, -(-spec.row_bytes(k) // CHUNK_BYTES) * CHUNK_BYTES


def parts_of(spec: Spec, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor of a matrix, the optional perm aside."""
    return expected_tensors(spec, shape) | {"codes": (codes_shape(spec, shape), torch.uint8)}


def nbytes_of(spec: Spec, shape: tuple[int, int]) -> int:
    return sum(math.prod(size) * kind.itemsize for size, kind in parts_of(spec, shape).values())


def to_gpu(packed: Packed) -> GpuMatrix:
    """The same matrix with its codes in GPU order, on the packed matrix's device."""
    parts = {field.name: getattr(packed, field.name) for field in fields(GpuMatrix)}
    return GpuMatrix(**parts | {"codes": interleave(packed.codes, packed.spec.bits)})


def from_gpu(matrix: GpuMatrix) -> Packed:
    """The inverse of `to_gpu`, bit for bit."""
    parts = {field.name: getattr(matrix, field.name) for field in fields(GpuMatrix)}
    codes = separate(matrix.codes, matrix.spec.bits)
    codes = codes[:, : matrix.spec.row_bytes(matrix.shape[1])].contiguous()
    return Packed(**parts | {"codes": codes})


def interleave(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """(N, row_bytes) uint8 as in `Packed` -> (N, CHUNK_BYTES * ceil(row_bytes / CHUNK_BYTES))."""
    codes = pad(codes, (0, -codes.shape[1] % CHUNK_BYTES))
    n, row_bytes = codes.shape
    if bits == 8:  # word, eighth weight, lane, weight of the pair
        return codes.view(n, -1, 4, 2, 4, 2).transpose(3, 4).transpose(2, 3).reshape(n, row_bytes)
    nibbles = torch.stack((codes & 15, codes >> 4), dim=-1)
    words = nibbles.view(n, -1, 4, 4, 4, 2)  # word, half and eighth weight, lane, of the pair
    words = words.permute(0, 1, 4, 2, 3, 5).reshape(n, -1, 8)[..., NIBBLES]
    return (words[..., ::2] | words[..., 1::2] << 4).reshape(n, row_bytes)


def separate(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `interleave`, (N, CHUNK_BYTES * chunks) uint8 both."""
    n, row_bytes = codes.shape
    if bits == 8:
        return codes.view(n, -1, 4, 4, 2, 2).transpose(2, 3).transpose(3, 4).reshape(n, row_bytes)
    nibbles = torch.stack((codes & 15, codes >> 4), dim=-1).view(n, -1, 8)
    nibbles = nibbles[..., torch.tensor(NIBBLES).argsort()].view(n, -1, 4, 4, 4, 2)
    nibbles = nibbles.permute(0, 1, 3, 4, 2, 5).reshape(n, row_bytes, 2)
    return nibbles[..., 0] | nibbles[..., 1] << 4
