// 32 words of 16 bits a vector, for AVX-512 with VNNI. After lanes_avx512.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace shallow {
namespace {

// A pair of words is the left or right operand of one of 16 sums of 32 bits.
struct Words {
    using I = __m512i;

    static I zero() { return _mm512_setzero_si512(); }
    static I set(std::int32_t pair) { return _mm512_set1_epi32(pair); }
    static I load(const std::int32_t* p) { return _mm512_loadu_si512(p); }
    static void store(std::int32_t* p, I v) { _mm512_storeu_si512(p, v); }
    static I add_products(I sum, I left, I right) { return _mm512_dpwssd_epi32(sum, left, right); }
    // Each sum's pair of words from two vectors of floats, rounded.
    static I pairs(__m512 even, __m512 odd) {
        return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_cvtps_epi32(even),
                                       _mm512_slli_epi32(_mm512_cvtps_epi32(odd), 16));
    }
    // Two vectors of floats one behind the other, rounded.
    static I in_order(__m512 first, __m512 second) {
        const __m256i low = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(first));
        return _mm512_inserti64x4(_mm512_castsi256_si512(low),
                                  _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(second)), 1);
    }
    static __m512 to_floats(I v) { return _mm512_cvtepi32_ps(v); }
    static __m512 root(__m512 v) { return _mm512_sqrt_ps(v); }
};

}  // namespace
}  // namespace shallow
