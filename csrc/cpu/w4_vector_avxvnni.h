// AVX2's vectors with VNNI of 256 bits: AVX-VNNI's own, or AVX-512's where the file is compiled for it.
#pragma once

#include "cpu/w4_vector_avx2.h"

namespace shallow {
namespace {

struct AvxVnni : Avx2 {
    static constexpr bool words = false;  // one step for a byte as for a nibble
    static constexpr bool keeps_supers = false;

    template <Codes C, int First, int Last, int P, int R>
    SHALLOW_INLINE static void dots(const TileView& w, const uint8_t* block, const int8_t* q,
                                    F (&out)[P][R], int64_t apart = kBlock) {
        __m256i sums[P][R] = {};
        load_anew(block, q);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            __m256i code[P][2];
            for (int p = 0; p < P; ++p) {
                load_codes<C, First, Last>(block, j, p, code[p]);
                if constexpr (C == Codes::nibble_table)
                    for (int half = First; half < Last; ++half)
                        code[p][half] = _mm256_shuffle_epi8(
                            _mm256_broadcastsi128_si256(load_16_bytes(w.values8)), code[p][half]);
            }
#pragma GCC unroll 2
            for (int half = First; half < Last; ++half) {
#pragma GCC unroll 8
                for (int i = 0; i < R; ++i) {
                    const __m256i x = word(q + i * apart + 16 * (half - First) + 4 * j);
                    for (int p = 0; p < P; ++p) {
                        sums[p][i] = add_products(sums[p][i], code[p][half], x);
                        in_this_order(sums[p][i]);
                    }
                }
            }
        }
        for (int i = 0; i < R; ++i)
            for (int p = 0; p < P; ++p) out[p][i] = _mm256_cvtepi32_ps(sums[p][i]);
    }
    static __m256i add_products(__m256i sum, __m256i codes, __m256i x) {
#if defined(__AVX512VNNI__)
        return _mm256_dpbusd_epi32(sum, codes, x);
#else
        return _mm256_dpbusd_avx_epi32(sum, codes, x);
#endif
    }
};

}  // namespace
}  // namespace shallow
