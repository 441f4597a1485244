"""GGUF blocks (llama.cpp) to the packed group format, without loss.

Q4_0, Q4_1, IQ4_NL, Q8_0 and Q4_K keep their bits. Q5_0, Q5_1, Q5_K and Q6_K become 8-bit codes
under the exact scales. Unpacking gives what `gguf.quants.dequantize` gives, bit for bit.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.kernels.w4.format import IQ4_NL, Packed, Spec, check_finite, validate


@dataclass(frozen=True)
class Block:
    """The block of one GGUF type: `weights` along K in `nbytes` bytes."""

    weights: int
    nbytes: int
    spec: Spec
    # (N, B, nbytes) -> codes, rows of which need no padding (K is a multiple of 32), scales, ...
    split: Callable[[torch.Tensor], dict[str, torch.Tensor]]


def from_blocks(
    type_name: str, shape: tuple[int, int], data: torch.Tensor, name: str = "tensor"
) -> Packed:
    """(N, K) of GGUF type `type_name` from its bytes, uint8 of any shape, in row order.

    Raises ValueError or TypeError naming `name`: a type without a group format, K that is no
    multiple of the block, bytes that do not fit the shape, scales that are NaN or Inf.
    """
    block = check_blocks(type_name, shape, data, name)
    n, k = shape
    parts = block.split(data.reshape(n, k // block.weights, block.nbytes))
    parts["codes"] = parts["codes"].reshape(n, block.spec.row_bytes(k))
    parts = {part: tensor.contiguous() for part, tensor in parts.items()}
    return check_finite(validate(Packed(block.spec, (n, k), **parts), name), name)


def check_blocks(
    type_name: str, shape: tuple[int, int], data: torch.Tensor, name: str = "tensor"
) -> Block:
    """The type's block, where `data` holds (N, K) of it; raises as `from_blocks` does."""
    block = BLOCKS.get(type_name)
    if block is None:
        raise ValueError(f"{name}: GGUF type must be one of {tuple(BLOCKS)}, found {type_name!r}")
    n, k = shape
    if k % block.weights:
        raise ValueError(f"{name}: {type_name} needs K in blocks of {block.weights}, found K={k}")
    if data.dtype != torch.uint8:
        raise TypeError(f"{name}: blocks must be uint8, found {data.dtype}")
    blocks = k // block.weights
    if data.numel() != n * blocks * block.nbytes:
        raise ValueError(
            f"{name}: {type_name} {tuple(shape)} has {n * blocks * block.nbytes} bytes, "
            f"found {data.numel()}"
        )
    return block


def _halves(data: torch.Tensor) -> torch.Tensor:
    """(N, B, 2) bytes -> (N, B) float16."""
    return data.contiguous().view(torch.float16)[..., 0]


def _pairs(data: torch.Tensor, run: int) -> torch.Tensor:
    """`_nibbles`, two to a byte: (N, B, bytes) -> (N, B, bytes). Two bytes at a time, for speed."""
    words = data.contiguous().view(torch.int16).unflatten(-1, (-1, run // 2))
    low = words & 15 | words >> 4 & 240
    high = words >> 4 & 15 | words >> 8 & 240
    return torch.stack((low, high), dim=-2).to(torch.uint8).flatten(2)


def _nibbles(data: torch.Tensor, run: int) -> torch.Tensor:
    """(N, B, bytes) -> (N, B, 2 * bytes): each run of bytes, low nibbles before high ones."""
    runs = data.unflatten(-1, (-1, run))
    return torch.stack((runs & 15, runs >> 4), dim=-2).flatten(2)


def _bits(data: torch.Tensor, width: int, run: int) -> torch.Tensor:
    """(N, B, bytes) -> (N, B, fields): each run of bytes, its lowest `width`-bit fields first."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=data.device)[:, None]
    runs = data.unflatten(-1, (-1, 1, run))
    return (runs >> shifts & (1 << width) - 1).flatten(2)


def _q4_0(blocks: torch.Tensor) -> dict[str, torch.Tensor]:
    d, low = blocks.split((2, 16), -1)
    return {"codes": _pairs(low, 16), "scales": _halves(d)}


def _q4_1(blocks: torch.Tensor) -> dict[str, torch.Tensor]:
    d, m, low = blocks.split((2, 2, 16), -1)
    return {"codes": _pairs(low, 16), "scales": _halves(d), "mins": _halves(m)}


def _iq4_nl(blocks: torch.Tensor) -> dict[str, torch.Tensor]:
    table = torch.tensor(IQ4_NL, dtype=torch.float32, device=blocks.device)
    return _q4_0(blocks) | {"codebook": table}


def _q5_0(blocks: torch.Tensor) -> dict[str, torch.Tensor]:
    d, high, low = blocks.split((2, 4, 16), -1)
    codes = _nibbles(low, 16) | _bits(high, 1, 1) << 4  # 0..31, means code - 16
    return {"codes": codes + (128 - 16), "scales": _halves(d)}


def _q5_1(blocks: torch.Tensor) -> dict[str, torch.Tensor]:
    d, m, high, low = blocks.split((2, 2, 4, 16), -1)
    codes = _nibbles(low, 16) | _bits(high, 1, 1) << 4
    return {"codes": codes, "scales": _halves(d), "mins": _halves(m)}


def _q8_0(blocks: torch.Tensor) -> dict[str, torch.Tensor]:
    d, signed = blocks.split((2, 32), -1)
    return {"codes": signed ^ 128, "scales": _halves(d)}  # int8 + 128, by its sign bit


def _sub_scales(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, B, 12) bytes -> (N, B * 8) 6-bit scales and mins of the K-quants."""
    first, second, rest = packed.split(4, -1)
    scales = torch.cat((first & 63, rest & 15 | first >> 6 << 4), -1)
    mins = torch.cat((second & 63, rest >> 4 | second >> 6 << 4), -1)
    return scales.flatten(1), mins.flatten(1)


def _q4_k(blocks: torch.Tensor) -> dict[str, torch.Tensor]:
    supers, packed, low = blocks.split((4, 12, 128), -1)
    scales, mins = _sub_scales(packed)
    supers = supers.contiguous().view(torch.float16)
    return {"codes": _pairs(low, 32), "scales": scales, "mins": mins, "supers": supers}


def _q5_k(blocks: torch.Tensor) -> dict[str, torch.Tensor]:
    d, dmin, packed, high, low = blocks.split((2, 2, 12, 32, 128), -1)
    d, dmin = (_halves(half).float().repeat_interleave(8, 1) for half in (d, dmin))
    scales, mins = _sub_scales(packed)
    codes = _nibbles(low, 32) | _bits(high, 1, 32) << 4
    return {"codes": codes, "scales": d * scales, "mins": -(dmin * mins)}


def _q6_k(blocks: torch.Tensor) -> dict[str, torch.Tensor]:
    low, high, signed, d = blocks.split((128, 64, 16, 2), -1)
    scales = _halves(d).float()[..., None] * signed.contiguous().view(torch.int8)
    codes = _nibbles(low, 64) | _bits(high, 2, 32) << 4  # 0..63, means code - 32
    return {"codes": codes + (128 - 32), "scales": scales.flatten(1)}


BLOCKS = {
    "Q4_0": Block(32, 18, Spec(4, 32, "symmetric"), _q4_0),
    "Q4_1": Block(32, 20, Spec(4, 32, "minimum"), _q4_1),
    "IQ4_NL": Block(32, 18, Spec(4, 32, "codebook"), _iq4_nl),
    "Q5_0": Block(32, 22, Spec(8, 32, "symmetric"), _q5_0),
    "Q5_1": Block(32, 24, Spec(8, 32, "minimum"), _q5_1),
    "Q8_0": Block(32, 34, Spec(8, 32, "symmetric"), _q8_0),
    "Q4_K": Block(256, 144, Spec(4, 32, "kquant"), _q4_k),
    "Q5_K": Block(256, 176, Spec(8, 32, "minimum", torch.float32), _q5_k),
    "Q6_K": Block(256, 210, Spec(8, 16, "symmetric", torch.float32), _q6_k),
}
