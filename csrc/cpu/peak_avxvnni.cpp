#include <immintrin.h>

#include "cpu/peak.h"

std::int64_t shallow::peak_avxvnni(std::int64_t rounds) {
    const __m256i a = _mm256_set1_epi8(3);
    __m256i b = _mm256_set1_epi8(5), sums[kPeakChains] = {};
    for (std::int64_t i = 0; i < rounds; ++i) {
        asm volatile("" : "+x"(b));  // one round is not the next
        for (__m256i& sum : sums) sum = _mm256_dpbusd_avx_epi32(sum, a, b);
    }
    for (const __m256i& sum : sums) b = _mm256_add_epi32(b, sum);
    return _mm256_extract_epi32(b, 0);
}
