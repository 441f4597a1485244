#include "cpu/w4_vector_avx2.h"

namespace shallow {
namespace {

struct AvxVnni : Avx2 {
    template <Codes C, int Halves>
    static F dot(const Chunks<C, Halves>& codes, const int8_t* q) {
        __m256i even = _mm256_setzero_si256(), odd = even;
#pragma GCC unroll 4
        for (int j = 0; j < 4 * Halves; j += 2) {
            even = _mm256_dpbusd_avx_epi32(even, codes.chunk[j], word(q + 4 * j));
            odd = _mm256_dpbusd_avx_epi32(odd, codes.chunk[j + 1], word(q + 4 * j + 4));
        }
        return _mm256_cvtepi32_ps(_mm256_add_epi32(even, odd));
    }
};

}  // namespace

const Kernels kKernelsAvxvnni = make_kernels<AvxVnni>();

}  // namespace shallow
