// Tiles of bfloat16 for files compiled for AMX. Everything is local to the including file.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace shallow {
namespace {

// Registers 0, 1: tiles of sums; 2: of the left operand; 3: of the right one. No more: on a shared
// machine a product takes, for seconds at a time, 25 ns with eight in use and 12 with four, at other
// times 6 with either. The other thread of the core, at tiles too, may leave few registers to rename
// loads to; what it does cannot be seen from here (benchmarks/results/decoder.md).
struct alignas(64) TileConfig {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {64, 64, 64, 64};
    std::uint8_t rows[16] = {16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64, "as the processor reads it");

constexpr std::int64_t kTile = 512;  // elements: 16 rows of 32, or 16 pairs of rows of 16

// Two rows of the right operand, rounded to bfloat16 side by side. A tie goes away from zero.
inline __m512i pair(__m512 even, __m512 odd) {
    const __m512i half = _mm512_set1_epi32(0x8000);
    const __m512i low = _mm512_add_epi32(_mm512_castps_si512(even), half);
    const __m512i high = _mm512_add_epi32(_mm512_castps_si512(odd), half);
    return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(low, 16), high);
}

// 32 floats, rounded to bfloat16 in order.
inline __m512i in_order(__m512 first, __m512 second) {
    const __m512bh both = _mm512_cvtne2ps_pbh(second, first);
    return reinterpret_cast<const __m512i&>(both);
}

}  // namespace
}  // namespace shallow
