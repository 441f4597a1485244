// 16 rows a vector, for AVX-512 with VNNI.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "cpu/sanitize.h"
#include "cpu/w4_kernel.h"

namespace shallow {
namespace {

struct Avx512 {
    using F = __m512;
    static constexpr int lanes = 16, max_rows = 16;
    static constexpr bool unpacks = true, keeps_codes = true, keeps_supers = true, words = false;
    template <Codes C>
    static constexpr int most_rows = max_rows;

    static F set(float v) { return _mm512_set1_ps(v); }
    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }

    static F load_half(const void* p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
    }
    static F load_bfloat(const void* p) {
        const __m256i bits = _mm256_loadu_si256(static_cast<const __m256i*>(p));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
    static F load_bytes(const void* p) {
        const __m128i bytes = _mm_loadu_si128(static_cast<const __m128i*>(p));
        return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
    }
    static F load_steps(const void* p) {
        const __m128i bytes = _mm_loadu_si128(static_cast<const __m128i*>(p));
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
    }
    static F load(const void* p, ScaleType type) {
        if (type == ScaleType::float16) return load_half(p);
        if (type == ScaleType::bfloat16) return load_bfloat(p);
        return _mm512_loadu_ps(p);
    }
    static __mmask16 mask(int count) { return static_cast<__mmask16>((1u << count) - 1); }
    static F load_some(const float* p, int count) {
        sanitizer_reads(p, count * sizeof *p);
        return _mm512_maskz_loadu_ps(mask(count), p);
    }
    static void store_all(float* p, F v) { _mm512_storeu_ps(p, v); }

    static void store(void* p, ScaleType type, F v, int count) {
        sanitizer_writes(p, count * element_bytes(type));
        if (type == ScaleType::float32) return _mm512_mask_storeu_ps(p, mask(count), v);
        const __m256i bits = type == ScaleType::float16
                                 ? _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
                                 : to_bfloat(v);
        _mm256_mask_storeu_epi16(p, mask(count), bits);
    }
    static __m256i to_bfloat(F v) {
        const __m512i raw = _mm512_castps_si512(v);
        const __m512i high = _mm512_srli_epi32(raw, 16);
        const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
        const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
        const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(raw, half), 16);
        const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
        return _mm512_cvtepi32_epi16(
            _mm512_mask_or_epi32(rounded, nan, high, _mm512_set1_epi32(0x40)));
    }
    // 16 rows x 2 columns of bfloat16
    static void load_pairs(const void* p, F& even, F& odd) {
        const __m512i pairs = _mm512_loadu_si512(p);
        even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
        odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-65536)));
    }

    // Chunks of code bytes, four a half-block. Raised: those of the last half are 16 times as large, as
    // high nibbles lie, for a lone row: to shift its sum is less than to shift four chunks.
    template <int Halves, bool Raised>
    struct Chunks {
        __m512i chunk[4 * Halves];
    };
    template <Codes C, int First, int Last, int R>
    static auto codes(const TileView& w, const uint8_t* block) {
        constexpr bool kRaised = C == Codes::nibble && Last == 2 && R == 1;
        const __m512i low = _mm512_set1_epi8(15), high = _mm512_set1_epi8(-16);
        Chunks<Last - First, kRaised> out;
        for (int half = First; half < Last; ++half)
            for (int j = 0; j < 4; ++j) {
                __m512i& chunk = out.chunk[4 * (half - First) + j];
                if constexpr (C == Codes::byte || C == Codes::unpacked) {
                    chunk = _mm512_loadu_si512(block + 64 * (4 * half + j));
                    continue;
                }
                if constexpr (C == Codes::six) {
                    chunk = six(block + 192 * half, j);
                    continue;
                }
                chunk = _mm512_loadu_si512(block + 64 * j);
                if (half && !kRaised) chunk = _mm512_srli_epi16(chunk, 4);
                chunk = _mm512_and_si512(chunk, half && kRaised ? high : low);
                if constexpr (C == Codes::nibble_table) {
                    const __m128i table =
                        _mm_loadu_si128(reinterpret_cast<const __m128i*>(w.values8));
                    chunk = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), chunk);
                }
            }
        return out;
    }

    // Chunk j of the four of half a block of sixes.
    static __m512i six(const uint8_t* half, int j) {
        const __m512i low = _mm512_set1_epi8(63);
        if (j < 3) return _mm512_and_si512(_mm512_loadu_si512(half + 64 * j), low);
        constexpr int kChoose = 0xca;  // by the first operand's bits the second's, else the third's
        const __m512i a = _mm512_srli_epi16(_mm512_loadu_si512(half), 2);
        const __m512i b = _mm512_srli_epi16(_mm512_loadu_si512(half + 64), 4);
        const __m512i c = _mm512_srli_epi16(_mm512_loadu_si512(half + 128), 6);
        const __m512i ab = _mm512_ternarylogic_epi32(_mm512_set1_epi8(48), a, b, kChoose);
        return _mm512_and_si512(_mm512_ternarylogic_epi32(_mm512_set1_epi8(60), ab, c, kChoose),
                                low);
    }

    // In assembly for two instructions a product that the compiler adds: a broadcast, and a copy
    // of zero, which takes a port that the products need.
    template <int Halves, bool Raised>
    static F dot(const Chunks<Halves, Raised>& codes, const int8_t* q) {
        constexpr int kChunks = 4 * Halves, kFirst = Raised ? kChunks - 4 : 0;
        sanitizer_reads(q, 16 * Halves);
        using Bytes = const char[16 * Halves];
        Bytes& bytes = *reinterpret_cast<Bytes*>(q);
        __m512i sum;
        asm("vpxord %0, %0, %0\n\tvpdpbusd %c3(%2)%{1to16%}, %1, %0"
            : "=&v"(sum)
            : "v"(codes.chunk[kFirst]), "r"(q), "i"(4 * kFirst), "m"(bytes));
#pragma GCC unroll 7
        for (int i = 1; i < kChunks; ++i) {
            if (Raised && i == 4) sum = _mm512_srai_epi32(sum, 4);
            const int j = (kFirst + i) % kChunks;
            asm("vpdpbusd %c3(%2)%{1to16%}, %1, %0"
                : "+v"(sum)
                : "v"(codes.chunk[j]), "r"(q), "i"(4 * j), "m"(bytes));
        }
        if (Raised && Halves == 1) sum = _mm512_srai_epi32(sum, 4);
        return _mm512_cvtepi32_ps(sum);
    }
    template <Codes C>
    static void unpack(const TileView& w, const uint8_t* block, uint8_t* out) {
        const auto bytes = codes<C, 0, 2, max_rows>(w, block);
        for (int j = 0; j < 8; ++j) _mm512_storeu_si512(out + 64 * j, bytes.chunk[j]);
    }
    // Chunk j of a block's eight, the code of column 4 j + byte at bit 8 * byte.
    template <Codes C>
    static __m512i chunk(const uint8_t* block, int j) {
        if (C == Codes::byte) return _mm512_loadu_si512(block + 64 * j);
        if (C == Codes::six) return six(block + j / 4 * 192, j % 4);
        const __m512i both = _mm512_loadu_si512(block + 64 * (j % 4));
        return j < 4 ? both : _mm512_srli_epi32(both, 4);
    }
    template <Codes C>
    static F code(const TileView& w, __m512i chunk, int byte) {
        const __m512i shifted = _mm512_srli_epi32(chunk, 8 * byte);
        if (C == Codes::byte || C == Codes::six)
            return _mm512_cvtepi32_ps(_mm512_and_si512(shifted, _mm512_set1_epi32(255)));
        return _mm512_permutexvar_ps(shifted, _mm512_loadu_ps(w.values));  // uses 4 bits
    }

    // count elements, zeros up to 32.
    static void widen(const void* from, ScaleType type, float* to, int count) {
        sanitizer_reads(from, count * element_bytes(type));
        for (int half = 0; half < 2; ++half) {
            const int some = count - 16 * half;
            const __mmask16 present = some >= 16 ? mask(16) : some > 0 ? mask(some) : mask(0);
            F v;
            if (type == ScaleType::float32) {
                v = _mm512_maskz_loadu_ps(present, static_cast<const float*>(from) + 16 * half);
            } else {
                const auto* const p = static_cast<const std::uint16_t*>(from) + 16 * half;
                const __m256i bits = _mm256_maskz_loadu_epi16(present, p);
                v = type == ScaleType::float16
                        ? _mm512_cvtph_ps(bits)
                        : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
            }
            _mm512_storeu_ps(to + 16 * half, v);
        }
    }

    // 32 floats -> int8, the scale, and the sums of both halves.
    static float quantize(const float* x, int8_t* q, std::int32_t* sums) {
        const F a = _mm512_loadu_ps(x), b = _mm512_loadu_ps(x + 16);
        // As integers, so that NaN counts as larger than infinity and spoils the scale.
        const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
        const __m512i largest =
            _mm512_max_epi32(_mm512_and_si512(_mm512_castps_si512(a), magnitude),
                             _mm512_and_si512(_mm512_castps_si512(b), magnitude));
        const int bits = _mm512_reduce_max_epi32(largest);
        float peak;
        std::memcpy(&peak, &bits, sizeof peak);
        const bool tiny = peak < kTiny;
        const F inverse = set(tiny ? 0.0f : 127.0f / peak);
        const __m128i low = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(mul(a, inverse)));
        const __m128i high = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(mul(b, inverse)));
        const __m256i both = _mm256_set_m128i(high, low);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(q), both);
        __m256i sum = _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(1), both);
        sum = _mm256_add_epi32(sum, _mm256_shuffle_epi32(sum, 0x4e));
        sum = _mm256_add_epi32(sum, _mm256_shuffle_epi32(sum, 0xb1));
        sums[0] = _mm256_cvtsi256_si32(sum);
        sums[1] = _mm_cvtsi128_si32(_mm256_extracti128_si256(sum, 1));
        return tiny ? 0.0f : peak / 127.0f;
    }
};

}  // namespace
}  // namespace shallow
