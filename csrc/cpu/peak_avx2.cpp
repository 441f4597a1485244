#include <immintrin.h>

#include "cpu/peak_chains.h"

namespace {

// Without VNNI the cheapest exact form adds products in 16 bits.
struct Step {
    __m256i a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(5);

    static __m256i of_words(int value) { return _mm256_set1_epi32(value); }
    static int word(__m256i sum) { return _mm256_extract_epi32(sum, 0); }
    void add_product(__m256i& sum) {
        asm volatile("" : "+x"(b));  // one product is not the next
        sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(a, b));
    }
};

}  // namespace

std::int64_t shallow::peak_avx2(std::int64_t rounds) { return run_chains<Step>(rounds); }
