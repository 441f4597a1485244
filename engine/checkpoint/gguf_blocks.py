"""The block formats of GGUF tensors, and their values in float32.

A row of K weights is K / `weights` blocks of `nbytes` bytes. Every formula is the one of the
`gguf` package (ggml's reference), in the same order of operations, so values agree bit for bit.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

# Below the 32768 elements from which torch splits an operation over threads: their meetings cost
# more than they save here, a hundredfold on a busy machine. The temporaries stay in the cache.
_CHUNK_WEIGHTS = 24576


@dataclass(frozen=True)
class BlockType:
    """`dtype` is set for plain numbers, None for quantised blocks."""

    name: str
    weights: int
    nbytes: int
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class GgufBlocks:
    """A quantised matrix as stored: `data` is (N, bytes a row) uint8, `shape` is (N, K)."""

    type: str
    shape: tuple[int, int]
    data: torch.Tensor


BLOCK_TYPES = {
    0: BlockType("F32", 1, 4, torch.float32),
    1: BlockType("F16", 1, 2, torch.float16),
    2: BlockType("Q4_0", 32, 18),
    3: BlockType("Q4_1", 32, 20),
    6: BlockType("Q5_0", 32, 22),
    7: BlockType("Q5_1", 32, 24),
    8: BlockType("Q8_0", 32, 34),
    12: BlockType("Q4_K", 256, 144),
    13: BlockType("Q5_K", 256, 176),
    14: BlockType("Q6_K", 256, 210),
    30: BlockType("BF16", 1, 2, torch.bfloat16),
}
UNREAD_TYPES = {
    9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS",
    19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16",
    26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip


def dequantise(blocks: GgufBlocks) -> torch.Tensor:
    """(N, K) float32."""
    kind = next(kind for kind in BLOCK_TYPES.values() if kind.name == blocks.type)
    values = torch.empty(blocks.shape, dtype=torch.float32)
    flat = values.view(-1, kind.weights)
    stored = blocks.data.reshape(-1, kind.nbytes)
    step = _CHUNK_WEIGHTS // kind.weights
    for start in range(0, len(stored), step):
        flat[start : start + step] = _VALUES[kind.name](stored[start : start + step])
    return values


def _half(b: torch.Tensor, at: int) -> torch.Tensor:
    """(B, 1) float32 from the fp16 at byte `at` of every block."""
    return b[:, at : at + 2].view(torch.float16).float()


def _nibbles(b: torch.Tensor, run: int) -> torch.Tensor:
    """Runs of `run` bytes, all low halves and then all high halves: (B, n) -> (B, 2 n) uint8."""
    b = b.reshape(len(b), -1, 1, run)
    return torch.cat((b & 15, b >> 4), dim=2).flatten(1)


def _bits(b: torch.Tensor) -> torch.Tensor:
    """The bits of four bytes, low first: (B, 4) -> (B, 32) uint8."""
    return (b[:, :, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten(1)


def _q4_0(b: torch.Tensor) -> torch.Tensor:
    return (_nibbles(b[:, 2:], 16).float() - 8) * _half(b, 0)


def _q4_1(b: torch.Tensor) -> torch.Tensor:
    return _nibbles(b[:, 4:], 16).float() * _half(b, 0) + _half(b, 2)


def _q5_0(b: torch.Tensor) -> torch.Tensor:
    q = _nibbles(b[:, 6:], 16) | _bits(b[:, 2:6]) << 4
    return (q.float() - 16) * _half(b, 0)


def _q5_1(b: torch.Tensor) -> torch.Tensor:
    q = _nibbles(b[:, 8:], 16) | _bits(b[:, 4:8]) << 4
    return q.float() * _half(b, 0) + _half(b, 2)


def _q8_0(b: torch.Tensor) -> torch.Tensor:
    return b[:, 2:].view(torch.int8).float() * _half(b, 0)


def _k_scales(b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and minimum of eight sub-blocks of 32, (B, 8, 1) float32 each: 6 bits times fp16.

    Twelve bytes hold them: 0-3 and 4-7 the low six bits of the first four scales and minima, 8-11
    the low four bits of the last four, whose high two bits sit on top of bytes 0-7.
    """
    low, middle, high = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scales = torch.cat((low & 63, high & 15 | low >> 6 << 4), dim=1)
    minima = torch.cat((middle & 63, high >> 4 | middle >> 6 << 4), dim=1)
    return (scales.float() * _half(b, 0))[..., None], (minima.float() * _half(b, 2))[..., None]


def _q4_k(b: torch.Tensor) -> torch.Tensor:
    scales, minima = _k_scales(b)
    q = _nibbles(b[:, 16:], 32).view(-1, 8, 32)
    return (q.float() * scales - minima).flatten(1)


def _q5_k(b: torch.Tensor) -> torch.Tensor:
    scales, minima = _k_scales(b)
    fifth = b[:, None, 16:48] >> torch.arange(8, dtype=torch.uint8)[:, None] & 1
    q = _nibbles(b[:, 48:], 32).view(-1, 8, 32) | fifth << 4
    return (q.float() * scales - minima).flatten(1)


def _q6_k(b: torch.Tensor) -> torch.Tensor:
    scales = b[:, 192:208].view(torch.int8).float() * _half(b, 208)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8)[:, None]
    top = b[:, 128:192].reshape(-1, 2, 1, 32) >> shifts & 3
    q = _nibbles(b[:, :128], 64) | top.flatten(1) << 4
    return ((q.float() - 32).view(-1, 16, 16) * scales[..., None]).flatten(1)


_VALUES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
