#include <immintrin.h>

#include "cpu/peak.h"

// Without VNNI the cheapest exact form adds products in 16 bits.
std::int64_t shallow::peak_avx2(std::int64_t rounds) {
    const __m256i a = _mm256_set1_epi8(3);
    __m256i b = _mm256_set1_epi8(5), sums[kPeakChains] = {};
    for (std::int64_t i = 0; i < rounds; ++i) {
        for (__m256i& sum : sums) {
            asm volatile("" : "+x"(b));  // one product is not the next
            sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(a, b));
        }
    }
    for (const __m256i& sum : sums) b = _mm256_add_epi16(b, sum);
    return _mm256_extract_epi32(b, 0);
}
