#include <immintrin.h>

#include "cpu/peak.h"

std::int64_t shallow::peak_avx512(std::int64_t rounds) {
    const __m512i a = _mm512_set1_epi8(3);
    __m512i b = _mm512_set1_epi8(5), sums[kPeakChains] = {};
    for (std::int64_t i = 0; i < rounds; ++i) {
        asm volatile("" : "+v"(b));  // one round is not the next
        for (__m512i& sum : sums) sum = _mm512_dpbusd_epi32(sum, a, b);
    }
    for (const __m512i& sum : sums) b = _mm512_add_epi32(b, sum);
    return _mm512_reduce_add_epi32(b);
}
