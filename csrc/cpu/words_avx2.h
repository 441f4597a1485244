// 16 words of 16 bits a vector, for AVX2, with or without its 256-bit VNNI. After lanes_avx2.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace shallow {
namespace {

// A pair of words is the left or right operand of one of 8 sums of 32 bits.
struct Words {
    using I = __m256i;

    static I zero() { return _mm256_setzero_si256(); }
    static I set(std::int32_t pair) { return _mm256_set1_epi32(pair); }
    static I load(const std::int32_t* p) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    }
    static void store(std::int32_t* p, I v) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v);
    }
    static I add_products(I sum, I left, I right) {
#if defined(__AVXVNNI__)
        return _mm256_dpwssd_avx_epi32(sum, left, right);
#else
        return _mm256_add_epi32(sum, _mm256_madd_epi16(left, right));
#endif
    }
    // Each sum's pair of words from two vectors of floats, rounded.
    static I pairs(__m256 even, __m256 odd) {
        return _mm256_blend_epi16(_mm256_cvtps_epi32(even),
                                  _mm256_slli_epi32(_mm256_cvtps_epi32(odd), 16), 0xaa);
    }
    // Two vectors of floats one behind the other, rounded.
    static I in_order(__m256 first, __m256 second) {
        return _mm256_permute4x64_epi64(
            _mm256_packs_epi32(_mm256_cvtps_epi32(first), _mm256_cvtps_epi32(second)), 0xd8);
    }
    static __m256 to_floats(I v) { return _mm256_cvtepi32_ps(v); }
    static __m256 root(__m256 v) { return _mm256_sqrt_ps(v); }
};

}  // namespace
}  // namespace shallow
