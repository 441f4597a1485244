"""Packed matrices as GGUF blocks, without loss: the reverse of kernels/w4/from_gguf.py.

Groups of 64, 128 and whole rows repeat their scale in blocks of 32. The 8-bit codes that Q5_0,
Q5_1, Q5_K and Q6_K became go back into these.
"""

import torch

from engine.checkpoint.gguf_blocks import GgufBlocks
from engine.export.quantized import as_half
from engine.kernels.w4.format import IQ4_NL, SUPER, Packed, unpack_codes

BLOCK = 32


def to_blocks(packed: Packed) -> GgufBlocks | str:
    """The same values in blocks, or the reason why GGUF has none for them."""
    spec, (_, k) = packed.spec, packed.shape
    if packed.perm is not None:
        return "GGUF has no activation order"
    if packed.codebook is not None and packed.codebook.tolist() != [*IQ4_NL]:
        return "GGUF has no codebook but that of IQ4_NL, which `engine quantize` takes for gptq"
    if spec.scheme == "kquant":
        return _kquant(packed) if k % SUPER == 0 else f"{k} inputs in blocks of {SUPER}"
    if spec.bits == 8 and spec.scale_dtype == torch.float32 and k % SUPER == 0:
        if (found := _wide_kquant(packed)) is not None:
            return found
    if packed.group % BLOCK or k % BLOCK or k % packed.group:
        return f"{k} inputs in groups of {packed.group}, expected blocks of {BLOCK}"
    scales = as_half(packed.scales)
    if scales is None:
        return f"its {spec.scale_dtype} scales are no float16"
    codes = unpack_codes(packed).unflatten(1, (-1, BLOCK))  # (N, B, 32)
    if spec.scheme in ("symmetric", "codebook") and spec.bits == 4:
        kind = "Q4_0" if spec.scheme == "symmetric" else "IQ4_NL"
        return _blocks(packed, kind, scales, _low_high(codes))
    if spec.scheme == "symmetric":
        low, high = (int(end) for end in codes.aminmax())
        if 112 <= low and high < 144:  # 16 to either side of the middle
            codes = codes - 112
            return _blocks(packed, "Q5_0", scales, _fifth_bits(codes), _low_high(codes & 15))
        return _blocks(packed, "Q8_0", scales, codes ^ 128)
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
    assert packed.supers is not None and packed.mins is not None  # of this scheme
    supers = packed.supers.contiguous().view(torch.uint8)
    codes = _low_high(unpack_codes(packed).unflatten(1, (-1, SUPER)), 32)
    return _supers(packed, "Q4_K", supers, _sub_scales(packed.scales, packed.mins), codes)


def _wide_kquant(packed: Packed) -> GgufBlocks | None:
    """Q5_K or Q6_K, where the float32 scales are products that these store as two factors."""
    codes = unpack_codes(packed).unflatten(1, (-1, SUPER))  # (N, B, 256)
    low, high = (int(end) for end in codes.aminmax())
    if packed.spec.scheme == "minimum" and packed.spec.group == 32 and high < 32:
        assert packed.mins is not None  # of this scheme
        factors = [_factors(part, 8, 0, 63) for part in (packed.scales, -packed.mins)]
        if None in factors:
            return None
        (d, scales), (dmin, mins) = (pair for pair in factors if pair is not None)
        supers = torch.stack((d, dmin), -1).view(torch.uint8)
        sub = _sub_scales(scales.to(torch.uint8).flatten(1), mins.to(torch.uint8).flatten(1))
        fifth = _fields(codes >> 4, 1)
        return _supers(packed, "Q5_K", supers, sub, fifth, _low_high(codes & 15, 32))
    if packed.spec.scheme == "symmetric" and packed.spec.group == 16 and 96 <= low <= high < 160:
        pair = _factors(packed.scales, 16, -128, 127)
        if pair is None:
            return None
        codes, (d, scales) = codes - 96, pair
        signed = scales.to(torch.int8).view(torch.uint8)
        halves = (_low_high(codes & 15, 64), _fields(codes >> 4, 2))
        return _supers(packed, "Q6_K", *halves, signed, d[..., None].view(torch.uint8))
    return None


def _supers(packed: Packed, kind: str, *parts: torch.Tensor) -> GgufBlocks:
    """`parts` (N, B, bytes) of blocks of 256, in order."""
    return GgufBlocks(kind, packed.shape, torch.cat(parts, -1).flatten(1))


def _sub_scales(scales: torch.Tensor, mins: torch.Tensor) -> torch.Tensor:
    """(N, G) 6-bit scales and minimums, 8 of each a block -> (N, B, 12) bytes."""
    (s0, s1), (m0, m1) = (part.unflatten(1, (-1, 2, 4)).unbind(2) for part in (scales, mins))
    return torch.cat((s0 | s1 >> 4 << 6, m0 | m1 >> 4 << 6, s1 & 15 | (m1 & 15) << 4), -1)


def _fields(codes: torch.Tensor, width: int) -> torch.Tensor:
    """(N, B, 256) below 2**width -> bytes: in each 32, their lowest fields are the first codes."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8)[:, None]
    runs = codes.unflatten(-1, (-1, len(shifts), 32)) << shifts
    return runs.sum(-2, dtype=torch.uint8).flatten(2)


def _factors(
    products: torch.Tensor, each: int, least: int, most: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(N, G) float32 -> d (N, B) float16 and whole numbers (N, B, each) with these products.

    None where a block has none: then the numbers did not come from one.
    """
    groups = products.double().unflatten(1, (-1, each))
    at = groups.abs().argmax(-1, keepdim=True)
    largest = groups.gather(-1, at)[..., 0]
    d = torch.zeros_like(largest)
    waiting = largest != 0
    for whole in range(1, max(most, -least) + 1):
        for sign in (1, -1):
            tried = sign * largest / whole
            exact = waiting & (tried.half().double() == tried)
            numbers = groups / torch.where(exact, tried, 1)[..., None]
            fits = (numbers == numbers.round()) & (numbers >= least) & (numbers <= most)
            found = exact & fits.all(-1)
            d, waiting = torch.where(found, tried, d), waiting & ~found
        if not waiting.any():
            return d.half(), groups / torch.where(d == 0, 1, d)[..., None]
    return None
