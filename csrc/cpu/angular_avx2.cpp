#include <immintrin.h>

#include <cstdint>

#include "cpu/angular.h"

namespace shallow {
namespace {

constexpr int kSumLanes = 4;
constexpr int kRegisterRows = 3;  // 9 sums and 4 operands in 16 registers

struct Wide {
    using Lane = double;
    using Vector = __m256d;
    static constexpr int W = 4, kRows = kRegisterRows, kBlock = 256;
    static Vector zero() { return _mm256_setzero_pd(); }
    static Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_pd(a, b, c); }
    static void store(double* p, Vector v) { _mm256_storeu_pd(p, v); }
    static void fold(double* sums, Vector v) { store(sums, _mm256_add_pd(load(sums), v)); }
    static Vector load(const double* p) { return _mm256_loadu_pd(p); }
    static Vector load(const float* p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
    static Vector load(const Half* p) { return _mm256_cvtps_pd(_mm_cvtph_ps(load16(p))); }
    static Vector load(const Bfloat* p) {
        const __m128i bits = _mm_slli_epi32(_mm_cvtepu16_epi32(load16(p)), 16);
        return _mm256_cvtps_pd(_mm_castsi128_ps(bits));
    }

private:
    static __m128i load16(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }
};

struct Narrow {
    using Lane = float;
    using Vector = __m256;
    static constexpr int W = 8, kRows = kRegisterRows, kBlock = 128;
    static Vector zero() { return _mm256_setzero_ps(); }
    static Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
    static void store(float* p, Vector v) { _mm256_storeu_ps(p, v); }
    static void fold(double* sums, Vector v) {
        const __m128 halves = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        Wide::fold(sums, _mm256_cvtps_pd(halves));
    }
    static Vector load(const float* p) { return _mm256_loadu_ps(p); }
    static Vector load(const Half* p) { return _mm256_cvtph_ps(load16(p)); }
    static Vector load(const Bfloat* p) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load16(p)), 16));
    }

private:
    static __m128i load16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
};

using BfloatTiles = void;

}  // namespace
}  // namespace shallow

#include "cpu/angular_kernel.h"

void shallow::angular_avx2(const AngularJob& job, int64_t begin, int64_t end, double* sums) {
    run_typed(job, begin, end, sums);
}
