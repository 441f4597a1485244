// 16 floats a vector, for AVX-512: what the row operations and attention are written in.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/sanitize.h"

namespace shallow {
namespace {

struct Lanes {
    using F = __m512;
    static constexpr int count = 16;
    static constexpr int wide = 4;  // vectors of a value row that stay in registers

    static F set(float v) { return _mm512_set1_ps(v); }
    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F div(F a, F b) { return _mm512_div_ps(a, b); }
    static F max(F a, F b) { return _mm512_max_ps(a, b); }
    static F min(F a, F b) { return _mm512_min_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static F sign_of(F magnitude, F sign) {
        const __m512i bit = _mm512_set1_epi32(INT32_MIN);
        return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(bit, _mm512_castps_si512(sign),
                                                             _mm512_castps_si512(magnitude), 0xca));
    }
    static F abs(F v) { return _mm512_abs_ps(v); }
    static F round(F v) { return _mm512_roundscale_ps(v, 0); }
    // v * 2^n for whole n from -126 to 127
    static F scale(F v, F n) { return _mm512_scalef_ps(v, n); }

    static float sum(F v) { return _mm512_reduce_add_ps(v); }
    static float peak(F v) { return _mm512_reduce_max_ps(v); }

    static F load(const float* p) { return _mm512_loadu_ps(p); }
    static F load(const std::uint16_t* p) {  // float16
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static F load(const std::int8_t* p) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
    }
    static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
    static void store(std::uint16_t* p, F v) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, 0));
    }
    static void store(std::int8_t* p, F v) {  // whole numbers from -127 to 127
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                         _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
    }

    // The first `some` lanes (1 to 16); the others read as 0 and are not written.
    static F load(const float* p, std::int64_t some) {
        sanitizer_reads(p, some * sizeof *p);
        return _mm512_maskz_loadu_ps(mask(some), p);
    }
    static void store(float* p, F v, std::int64_t some) {
        sanitizer_writes(p, some * sizeof *p);
        _mm512_mask_storeu_ps(p, mask(some), v);
    }
    static F first(F v, std::int64_t some) { return _mm512_maskz_mov_ps(mask(some), v); }

private:
    static __mmask16 mask(std::int64_t some) { return static_cast<__mmask16>((1u << some) - 1); }
};

}  // namespace
}  // namespace shallow
