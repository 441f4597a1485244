#include <immintrin.h>

#include "cpu/bandwidth.h"

uint64_t shallow::sum_words_avx2(const void* data, size_t bytes) {
    const auto* words = static_cast<const __m256i*>(data);
    __m256i sum[4] = {};
    for (size_t i = 0; i < bytes / sizeof(__m256i); i += 4)
        for (size_t j = 0; j < 4; ++j)
            sum[j] = _mm256_add_epi64(sum[j], _mm256_load_si256(words + i + j));
    alignas(32) uint64_t lane[4];
    const auto low = _mm256_add_epi64(sum[0], sum[1]), high = _mm256_add_epi64(sum[2], sum[3]);
    _mm256_store_si256(reinterpret_cast<__m256i*>(lane), _mm256_add_epi64(low, high));
    return lane[0] + lane[1] + lane[2] + lane[3];
}
