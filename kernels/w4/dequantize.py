"""Packed weights to tiles of numbers in registers: what the Triton kernels share.

Codes lie as layout_gpu.py says: a row's chunk of 64 bytes is 16 words, 4 of them for each lane of a
quad. Loaded as (R, 16) words and joined in the order of K, a tile (R, CHUNK) has every number where
a tensor core takes it from, so nothing moves between threads.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

# Weights carry it as a factor: scales down to 1e-6 keep their precision in float16, and weights of
# up to 1000 their finiteness.
LIFT = tl.constexpr(64.0)


@dataclass(frozen=True)
class Format:
    """What a kernel is compiled for. `scheme`, `bits`, `group` as in format.Spec."""

    scheme: str
    bits: int
    group: int
    even: bool  # K is a multiple of what a step of the kernel takes
    asm: bool  # false where kernels are interpreted: no PTX, and arithmetic in float32

    @property
    def chunk(self) -> int:
        """Weights in 64 bytes."""
        return 512 // self.bits

    @property
    def middle(self) -> int:
        """What is taken from a code before it is scaled."""
        return 1 << (self.bits - 1) if self.scheme == "symmetric" else 0

    @property
    def whole(self) -> bool:
        """A chunk lies in one group: it can be scaled after it is multiplied."""
        return (
            self.scheme not in ("plain", "kquant")
            and self.group in (0, 64, 128)
            and (self.group == 0 or self.group >= self.chunk)
        )

    @property
    def halves(self) -> bool:
        """The two halves of a word may lie in two groups."""
        return self.bits == 4 and self.group == 16


@triton.jit
def and_or(word, mask, base, FORMAT: tl.constexpr):
    """word & mask | base, in one instruction with its constants in it."""
    if FORMAT.asm:
        result = tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xea;", "=r,r,r,r", [word, mask, base], tl.int32,
            is_pure=True, pack=1,
        )  # fmt: skip
    else:
        result = word & mask | base
    return result


@triton.jit
def halves(word, DTYPE: tl.constexpr, FORMAT: tl.constexpr):
    """The low and the high 16 bits of int32 words as numbers of DTYPE."""
    if FORMAT.asm:
        low, high = tl.inline_asm_elementwise(
            "mov.b32 {$0, $1}, $2;", "=h,=h,r", [word], (tl.int16, tl.int16), is_pure=True, pack=1
        )
    else:
        low = word.to(tl.int16)
        high = (word >> 16).to(tl.int16)
    low = low.to(DTYPE, bitcast=True)
    high = high.to(DTYPE, bitcast=True)
    return (low, high) if FORMAT.asm else (low.to(tl.float32), high.to(tl.float32))


@triton.jit
def byte_perm(a, b, selector, FORMAT: tl.constexpr):
    """int32 words of the bytes that 4 nibbles of `selector`, each 0 to 7, choose from a and b."""
    if FORMAT.asm:
        chosen = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, selector], tl.int32, is_pure=True, pack=1
        )
    else:
        chosen = 0
        for i in tl.static_range(4):
            place = (selector >> (4 * i)) & 7
            byte = tl.where(place < 4, a >> (8 * (place & 3)), b >> (8 * (place & 3)))
            chosen |= (byte & 255) << (8 * i)
    return chosen


@triton.jit
def nibbles(word, DTYPE: tl.constexpr, FORMAT: tl.constexpr):
    """8 codes of 4 bits less the middle code, in the order of K.

    A code in the last bits of 1024 (float16) or 128 (bfloat16) is added to it. float16 has room
    for 4 bits more, so that every second pair needs no shift, but counts 16 times.
    """
    MIDDLE: tl.constexpr = FORMAT.middle
    codes: tl.tuple = ()
    for i in tl.static_range(4):
        if DTYPE == tl.float16:
            mask = 0x00F000F0 if i % 2 else 0x000F000F
            raised = and_or(word >> (8 * (i // 2)), mask, 0x64006400, FORMAT)
            low, high = halves(raised, DTYPE, FORMAT)
            if i % 2:
                # As tensors: before 3.9 Triton's fma takes a number for float32.
                sixteenth = tl.full((), 0.0625, DTYPE)
                less = tl.full((), -64.0 - MIDDLE, DTYPE)
                codes = codes + (tl.fma(low, sixteenth, less), tl.fma(high, sixteenth, less))
            else:
                codes = codes + (low - (1024 + MIDDLE), high - (1024 + MIDDLE))
        else:
            raised = and_or(word >> (4 * i), 0x000F000F, 0x43004300, FORMAT)
            low, high = halves(raised, DTYPE, FORMAT)
            codes = codes + (low - (128 + MIDDLE), high - (128 + MIDDLE))
    return codes


@triton.jit
def code_bytes(word, DTYPE: tl.constexpr, FORMAT: tl.constexpr):
    """4 codes of 8 bits less the middle code, in the order of K.

    Added to 1024 in float16; bfloat16 has no room for that: to 2^23 in float32, and rounded.
    """
    MIDDLE: tl.constexpr = FORMAT.middle
    codes: tl.tuple = ()
    if DTYPE == tl.float16:
        for i in tl.static_range(2):
            raised = byte_perm(word, 0x64646464, 0x4140 + 0x202 * i, FORMAT)
            low, high = halves(raised, DTYPE, FORMAT)
            codes = codes + (low - (1024 + MIDDLE), high - (1024 + MIDDLE))
    else:
        for i in tl.static_range(4):
            raised = byte_perm(word, 0x4B000000, 0x7540 + i, FORMAT).to(tl.float32, bitcast=True)
            code = raised - (8388608 + MIDDLE)
            codes = codes + (code.to(DTYPE) if FORMAT.asm else code,)
    return codes


@triton.jit
def load_table(codebook_ptr, DTYPE: tl.constexpr):
    """The 16 entries in DTYPE as 8 int32: the low bytes of 4 entries each, then the high bytes."""
    low: tl.tuple = ()
    high: tl.tuple = ()
    for word in tl.static_range(4):
        low_bytes = 0
        high_bytes = 0
        for i in tl.static_range(4):
            entry = tl.load(codebook_ptr + 4 * word + i).to(DTYPE)
            bits = entry.to(tl.int16, bitcast=True).to(tl.int32)
            low_bytes |= (bits & 255) << (8 * i)
            high_bytes |= ((bits >> 8) & 255) << (8 * i)
        low = low + (low_bytes,)
        high = high + (high_bytes,)
    return low + high


@triton.jit
def look_up(codes, table, DTYPE: tl.constexpr, FORMAT: tl.constexpr):
    """The entries of the 4 codes in the low 16 bits."""
    eighth = codes & 0x7777  # which of 8 entries; bit 3 says of which 8
    half = (codes >> 1) & 0x4444 | 0x3210
    lows = byte_perm(table[0], table[1], eighth, FORMAT)
    lows = byte_perm(lows, byte_perm(table[2], table[3], eighth, FORMAT), half, FORMAT)
    highs = byte_perm(table[4], table[5], eighth, FORMAT)
    highs = byte_perm(highs, byte_perm(table[6], table[7], eighth, FORMAT), half, FORMAT)
    first = halves(byte_perm(lows, highs, 0x5140, FORMAT), DTYPE, FORMAT)
    return first + halves(byte_perm(lows, highs, 0x7362, FORMAT), DTYPE, FORMAT)


@triton.jit
def lifted(groups, COMPUTE: tl.constexpr, FORMAT: tl.constexpr):
    """Scale and offset; what becomes a factor or a part of the weight is times LIFT."""
    scale, offset, d, dmin = groups
    scale = scale.to(tl.float32) * LIFT
    offset = offset.to(tl.float32)
    if FORMAT.scheme == "minimum":
        offset = offset * LIFT
    if FORMAT.scheme == "kquant":
        scale = scale * d.to(tl.float32)
        offset = offset * dmin.to(tl.float32) * -LIFT
    return scale.to(COMPUTE), offset.to(COMPUTE)


@triton.jit
def scaled(code, scale, offset, FORMAT: tl.constexpr):
    if FORMAT.scheme == "zero":
        weight = (code - offset) * scale
    elif FORMAT.scheme == "minimum" or FORMAT.scheme == "kquant":
        weight = tl.fma(code, scale, offset)
    else:
        weight = code * scale
    return weight


@triton.jit
def join_four(a, b, c, d):
    """A lane's weights 0, 1, 8 and 9 of 16: (R, 16, 2, 2), the last 8 apart."""
    return tl.join(tl.join(a, b), tl.join(c, d))


@triton.jit
def scale_four(a, b, c, d, groups, COMPUTE: tl.constexpr, FORMAT: tl.constexpr):
    scale, offset = lifted(groups, COMPUTE, FORMAT)
    a = scaled(a, scale, offset, FORMAT)
    b = scaled(b, scale, offset, FORMAT)
    c = scaled(c, scale, offset, FORMAT)
    return a, b, c, scaled(d, scale, offset, FORMAT)


@triton.jit
def dequantize(words, groups, table, DTYPE: tl.constexpr, FORMAT: tl.constexpr):
    """(R, 16) words -> (R, CHUNK) in DTYPE: weights times LIFT, by the groups of the words' halves;
    without groups what codes stand for before they are scaled, which DTYPE holds exactly."""
    R: tl.constexpr = words.shape[0]
    COMPUTE: tl.constexpr = DTYPE if FORMAT.asm else tl.float32
    if FORMAT.bits == 8:
        a, b, c, d = code_bytes(words, DTYPE, FORMAT)
        if groups is not None:
            a, b, c, d = scale_four(a, b, c, d, groups[0], COMPUTE, FORMAT)
        tile = join_four(a, b, c, d)
        tile = tl.permute(tl.reshape(tile, (R, 4, 4, 2, 2)), (0, 2, 4, 1, 3))
    else:
        if FORMAT.scheme == "codebook":
            a, c, e, g = look_up(words, table, DTYPE, FORMAT)
            b, d, f, h = look_up(words >> 16, table, DTYPE, FORMAT)
        else:
            a, b, c, d, e, f, g, h = nibbles(words, DTYPE, FORMAT)
        if groups is not None:
            a, b, c, d = scale_four(a, b, c, d, groups[0], COMPUTE, FORMAT)
            e, f, g, h = scale_four(e, f, g, h, groups[1], COMPUTE, FORMAT)
        tile = tl.join(join_four(a, b, c, d), join_four(e, f, g, h))
        tile = tl.reshape(tile, (R, 4, 4, 2, 2, 2))  # lane, word, weight of 2, pair, half
        tile = tl.permute(tile, (0, 2, 5, 4, 1, 3))
    return tl.reshape(tile, (R, FORMAT.chunk)).to(DTYPE)
