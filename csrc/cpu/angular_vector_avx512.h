// The vectors of angular_kernel.h for AVX-512.
#pragma once

#include <immintrin.h>

#include "cpu/angular.h"

namespace shallow {
namespace {

constexpr int kSumLanes = 8;
constexpr int kRegisterRows = 5;  // 25 sums and 6 operands in 32 registers

struct Wide {
    using Lane = double;
    using Vector = __m512d;
    static constexpr int W = 8, kRows = kRegisterRows, kBlock = 128;
    static Vector zero() { return _mm512_setzero_pd(); }
    static Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_pd(a, b, c); }
    static void store(double* p, Vector v) { _mm512_storeu_pd(p, v); }
    static void fold(double* sums, Vector v) { store(sums, _mm512_add_pd(load(sums), v)); }
    static Vector load(const double* p) { return _mm512_loadu_pd(p); }
    static Vector load(const float* p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
    static Vector load(const Half* p) { return _mm512_cvtps_pd(_mm256_cvtph_ps(load16(p))); }
    static Vector load(const Bfloat* p) {
        const __m256i bits = _mm256_slli_epi32(_mm256_cvtepu16_epi32(load16(p)), 16);
        return _mm512_cvtps_pd(_mm256_castsi256_ps(bits));
    }

private:
    static __m128i load16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
};

struct Narrow {
    using Lane = float;
    using Vector = __m512;
    static constexpr int W = 16, kRows = kRegisterRows, kBlock = 256;
    static Vector zero() { return _mm512_setzero_ps(); }
    static Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
    static void store(float* p, Vector v) { _mm512_storeu_ps(p, v); }
    static void fold(double* sums, Vector v) {
        const __m256 halves =
            _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
        Wide::fold(sums, _mm512_cvtps_pd(halves));
    }
    static Vector load(const float* p) { return _mm512_loadu_ps(p); }
    static Vector load(const Half* p) { return _mm512_cvtph_ps(load16(p)); }
    static Vector load(const Bfloat* p) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load16(p)), 16));
    }

private:
    static __m256i load16(const void* p) {
        return _mm256_loadu_si256(static_cast<const __m256i*>(p));
    }
};

}  // namespace
}  // namespace shallow
