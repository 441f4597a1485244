"""Packed matrices as GGUF blocks, without loss: the reverse of kernels/w4/from_gguf.py.

Groups of 64, 128 and whole rows repeat their scale in blocks of 32.
"""

import torch

from engine.checkpoint.gguf_blocks import BLOCK_TYPES, GgufBlocks
from engine.export.quantized import as_half
from engine.kernels.w4.format import SUPER, Packed, unpack_codes

BLOCK = 32
TYPES = {kind.name: number for number, kind in BLOCK_TYPES.items()}


def to_blocks(packed: Packed) -> GgufBlocks | str:
    """The same values in blocks, or the reason why GGUF has none for them."""
    spec, (_, k) = packed.spec, packed.shape
    if packed.perm is not None:
        return "GGUF has no activation order"
    if spec.scheme == "codebook":
        return "GGUF has no codebook of its own choice"
    if spec.scheme == "kquant":
        return _kquant(packed) if k % SUPER == 0 else f"{k} inputs in blocks of {SUPER}"
    if packed.group % BLOCK or k % BLOCK or k % packed.group:
        return f"{k} inputs in groups of {packed.group}, expected blocks of {BLOCK}"
    scales = as_half(packed.scales)
    if scales is None:
        return f"its {spec.scale_dtype} scales are no float16"
    codes = unpack_codes(packed).unflatten(1, (-1, BLOCK))  # (N, B, 32)
    if spec.scheme == "symmetric":
        kind = "Q4_0" if spec.bits == 4 else "Q8_0"
        return _blocks(packed, kind, scales, _low_high(codes) if spec.bits == 4 else codes ^ 128)
    mins = as_half(_minimum(packed))
    if mins is None:
        return "its zero points times their scales are no float16"
    if spec.bits == 4:
        return _blocks(packed, "Q4_1", scales, mins, _low_high(codes))
    if int(codes.max()) < 32:
        return _blocks(packed, "Q5_1", scales, mins, _fifth_bits(codes), _low_high(codes & 15))
    return "GGUF has no blocks of 8 bits with a minimum"


def _minimum(packed: Packed) -> torch.Tensor:
    """(N, G): the value of code 0."""
    if packed.mins is not None:
        return packed.mins
    assert packed.zeros is not None  # one of the two belongs to every scheme that comes here
    return -(packed.zeros.float() * packed.scales.float())


def _blocks(packed: Packed, kind: str, *parts: torch.Tensor) -> GgufBlocks:
    """`parts` in order: float16 (N, G) of groups, uint8 (N, B, bytes) of blocks."""
    n, k = packed.shape
    repeats = packed.group // BLOCK
    rows = [
        part.repeat_interleave(repeats, 1)[..., None].contiguous().view(torch.uint8)
        if part.dtype == torch.float16
        else part
        for part in parts
    ]
    return GgufBlocks(kind, (n, k), torch.cat(rows, -1).flatten(1))


def _low_high(codes: torch.Tensor, run: int = BLOCK // 2) -> torch.Tensor:
    """(N, B, codes) below 16 -> (N, B, codes / 2): in each 2 * run, the second half above."""
    low, high = codes.unflatten(-1, (-1, 2, run)).unbind(-2)
    return (low | high << 4).flatten(-2)


def _fifth_bits(codes: torch.Tensor) -> torch.Tensor:
    """(N, B, 32) -> (N, B, 4): bit 4 of every code, the first in the lowest bit."""
    shifts = torch.arange(8, dtype=torch.uint8)
    bits = (codes >> 4 & 1).unflatten(-1, (4, 8)) << shifts
    return bits.sum(-1, dtype=torch.uint8)


def _kquant(packed: Packed) -> GgufBlocks:
    """Q4_K: d, dmin, 12 bytes of 6-bit scales and minimums, 128 bytes of codes."""
    n, k = packed.shape
    assert packed.supers is not None and packed.mins is not None  # of this scheme
    scales, mins = (part.view(n, -1, 2, 4) for part in (packed.scales, packed.mins))
    (s0, s1), (m0, m1) = scales.unbind(2), mins.unbind(2)
    sub = torch.cat((s0 | s1 >> 4 << 6, m0 | m1 >> 4 << 6, s1 & 15 | (m1 & 15) << 4), -1)
    supers = packed.supers.contiguous().view(torch.uint8)
    codes = _low_high(unpack_codes(packed).unflatten(1, (-1, SUPER)), 32)
    return GgufBlocks("Q4_K", (n, k), torch.cat((supers, sub, codes), -1).flatten(1))
