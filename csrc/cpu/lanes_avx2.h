// 8 floats a vector, for AVX2 with FMA and F16C.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/sanitize.h"

namespace shallow {
namespace {

struct Lanes {
    using F = __m256;
    static constexpr int count = 8;
    static constexpr int wide = 2;

    static F set(float v) { return _mm256_set1_ps(v); }
    static F add(F a, F b) { return _mm256_add_ps(a, b); }
    static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static F div(F a, F b) { return _mm256_div_ps(a, b); }
    static F max(F a, F b) { return _mm256_max_ps(a, b); }
    static F min(F a, F b) { return _mm256_min_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static F abs(F v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }
    static F sign_of(F magnitude, F sign) {
        return _mm256_or_ps(abs(magnitude), _mm256_and_ps(_mm256_set1_ps(-0.0f), sign));
    }
    static F round(F v) {
        return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    }
    static F scale(F v, F n) {
        const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
        return mul(v, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
    }

    static float sum(F v) {
        __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        half = _mm_add_ps(half, _mm_movehl_ps(half, half));
        return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
    }
    static float peak(F v) {
        __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        half = _mm_max_ps(half, _mm_movehl_ps(half, half));
        return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
    }

    static F load(const float* p) { return _mm256_loadu_ps(p); }
    static F load(const std::uint16_t* p) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static F load(const std::int8_t* p) {
        const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
    }
    static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
    static void store(std::uint16_t* p, F v) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, 0));
    }
    static void store(std::int8_t* p, F v) {
        const __m256i words = _mm256_cvtps_epi32(v);
        const __m128i halves =
            _mm_packs_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(halves, halves));
    }

    static F load(const float* p, std::int64_t some) {
        sanitizer_reads(p, some * sizeof *p);
        return _mm256_maskload_ps(p, mask(some));
    }
    static void store(float* p, F v, std::int64_t some) {
        sanitizer_writes(p, some * sizeof *p);
        _mm256_maskstore_ps(p, mask(some), v);
    }
    static F first(F v, std::int64_t some) {
        return _mm256_and_ps(v, _mm256_castsi256_ps(mask(some)));
    }

private:
    static __m256i mask(std::int64_t some) {
        const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(some)), lane);
    }
};

}  // namespace
}  // namespace shallow
