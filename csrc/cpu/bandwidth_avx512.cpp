#include <immintrin.h>

#include "cpu/bandwidth.h"

uint64_t shallow::sum_words_avx512(const void* data, size_t bytes) {
    const auto* words = static_cast<const __m512i*>(data);
    __m512i sum[4] = {};
    for (size_t i = 0; i < bytes / sizeof(__m512i); i += 4)
        for (size_t j = 0; j < 4; ++j)
            sum[j] = _mm512_add_epi64(sum[j], _mm512_load_si512(words + i + j));
    const auto low = _mm512_add_epi64(sum[0], sum[1]), high = _mm512_add_epi64(sum[2], sum[3]);
    return static_cast<uint64_t>(_mm512_reduce_add_epi64(_mm512_add_epi64(low, high)));
}
