#include <immintrin.h>

#include "cpu/peak_chains.h"

namespace {

struct Step {
    __m256i a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(5);

    static __m256i of_words(int value) { return _mm256_set1_epi32(value); }
    static int word(__m256i sum) { return _mm256_extract_epi32(sum, 0); }
    void add_product(__m256i& sum) { sum = _mm256_dpbusd_avx_epi32(sum, a, b); }
};

}  // namespace

std::int64_t shallow::peak_avxvnni(std::int64_t rounds) { return run_chains<Step>(rounds); }
