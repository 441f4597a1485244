#include <immintrin.h>

#include "cpu/peak_chains.h"

namespace {

struct Step {
    __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(5);

    static __m512i of_words(int value) { return _mm512_set1_epi32(value); }
    static int word(__m512i sum) { return _mm_cvtsi128_si32(_mm512_castsi512_si128(sum)); }
    void add_product(__m512i& sum) { sum = _mm512_dpbusd_epi32(sum, a, b); }
};

}  // namespace

std::int64_t shallow::peak_avx512(std::int64_t rounds) { return run_chains<Step>(rounds); }
