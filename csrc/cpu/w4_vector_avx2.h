// 8 rows a vector, for AVX2, with or without its 256-bit VNNI.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "cpu/w4_kernel.h"

namespace shallow {
namespace {

struct Avx2 {
    using F = __m256;
    static constexpr int lanes = 8, max_rows = 8;
    template <Codes C>
    static constexpr int most_rows = 4;  // 8 of 16 registers are their sums
    static constexpr bool unpacks = false, keeps_codes = false, keeps_supers = true, words = true;
    template <Codes C>
    static constexpr bool joins_planes = C == Codes::six;  // which are long in unpacking

    static F set(float v) { return _mm256_set1_ps(v); }
    static F add(F a, F b) { return _mm256_add_ps(a, b); }
    static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }

    static F unless_negative(F v) {  // else NaN
        const __m256i sign = _mm256_srai_epi32(_mm256_castps_si256(v), 31);
        return _mm256_or_ps(v, _mm256_castsi256_ps(sign));
    }
    static F largest(F a, F b) {  // NaN where one is
        return _mm256_or_ps(_mm256_max_ps(a, b), _mm256_cmp_ps(a, b, _CMP_UNORD_Q));
    }
    static float horizontal_largest(F v) {
        v = largest(v, _mm256_permute2f128_ps(v, v, 1));
        v = largest(v, _mm256_shuffle_ps(v, v, 0x4e));
        return _mm256_cvtss_f32(largest(v, _mm256_shuffle_ps(v, v, 0xb1)));
    }

    static F from_half(__m128i bits) { return _mm256_cvtph_ps(bits); }
    static F from_bfloat(__m128i bits) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    }
    static __m128i load_16_bytes(const void* p) {
        return _mm_loadu_si128(static_cast<const __m128i*>(p));
    }
    static __m256i load_32_bytes(const void* p) {
        return _mm256_loadu_si256(static_cast<const __m256i*>(p));
    }
    static F load_half(const void* p) { return from_half(load_16_bytes(p)); }
    static F load_bytes(const void* p) {
        const __m128i bytes = _mm_loadl_epi64(static_cast<const __m128i*>(p));
        return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
    }
    static F load_steps(const void* p) {
        const __m128i bytes = _mm_loadl_epi64(static_cast<const __m128i*>(p));
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
    }
    static F load(const void* p, ScaleType type) {
        if (type == ScaleType::float32) return _mm256_loadu_ps(static_cast<const float*>(p));
        const __m128i bits = load_16_bytes(p);
        return type == ScaleType::float16 ? from_half(bits) : from_bfloat(bits);
    }
    static F load_some(const float* p, int count) {
        if (count == lanes) return _mm256_loadu_ps(p);
        alignas(32) float values[lanes] = {};
        std::memcpy(values, p, static_cast<std::size_t>(count) * sizeof(float));
        return _mm256_load_ps(values);
    }
    static void store_all(float* p, F v) { _mm256_storeu_ps(p, v); }

    static void store(void* p, ScaleType type, F v, int count) {
        if (type == ScaleType::float32) {
            if (count == lanes) return store_all(static_cast<float*>(p), v);
            alignas(32) float values[lanes];
            _mm256_store_ps(values, v);
            std::memcpy(p, values, static_cast<std::size_t>(count) * sizeof(float));
            return;
        }
        const __m128i bits = type == ScaleType::float16
                                 ? _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)
                                 : to_bfloat(v);
        if (count == lanes) return _mm_storeu_si128(static_cast<__m128i*>(p), bits);
        alignas(16) std::uint16_t halves[lanes];
        _mm_store_si128(reinterpret_cast<__m128i*>(halves), bits);
        std::memcpy(p, halves, static_cast<std::size_t>(count) * sizeof *halves);
    }
    static __m128i to_bfloat(F v) {
        const __m256i raw = _mm256_castps_si256(v);
        const __m256i high = _mm256_srli_epi32(raw, 16);
        const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
        const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
        const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(raw, half), 16);
        const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
        const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
        const __m256i words = _mm256_blendv_epi8(rounded, quiet, nan);
        return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    }

    // 8 rows x 2 columns of bfloat16
    static void load_pairs(const void* p, F& even, F& odd) {
        const __m256i pairs = load_32_bytes(p);
        even = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
        odd = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(-65536)));
    }

    // 8 rows x 4 columns of codes: chunk j of a half-block, part p of the tile.
    template <Codes C>
    static __m256i codes(const uint8_t* block, int half, int j, int p) {
        if constexpr (C == Codes::byte || C == Codes::unpacked)
            return load_32_bytes(block + 64 * (4 * half + j) + 32 * p);
        if constexpr (C == Codes::high) {
            const __m256i bytes = load_32_bytes(block + 64 * (4 * half + j) + 32 * p);
            return _mm256_and_si256(_mm256_srli_epi16(bytes, 1), _mm256_set1_epi8(127));
        }
        if constexpr (C == Codes::six) return six(block + 192 * half + 32 * p, j);
        const __m256i both = load_32_bytes(block + 64 * j + 32 * p);
        return nibble(half ? _mm256_srli_epi16(both, 4) : both);
    }
    // Both halves' codes of chunk j, part p, by one load: two a cycle are what a core has.
    template <Codes C, int First, int Last>
    SHALLOW_INLINE static void load_codes(const uint8_t* block, int j, int p, __m256i (&code)[2]) {
        if constexpr (C == Codes::nibble || C == Codes::nibble_table) {
            __m256i both = load_32_bytes(block + 64 * j + 32 * p);
            asm("" : "+x"(both));
            if (First == 0) code[0] = nibble(both);
            if (Last == 2) code[1] = nibble(_mm256_srli_epi16(both, 4));
        } else {
            for (int half = First; half < Last; ++half) code[half] = codes<C>(block, half, j, p);
        }
    }
    // Chunk j of the four of half a block of sixes.
    static __m256i six(const uint8_t* half, int j) {
        const __m256i low = _mm256_set1_epi8(63);
        if (j < 3) return _mm256_and_si256(load_32_bytes(half + 64 * j), low);
        const auto high = [&](int i) {
            return _mm256_andnot_si256(low, load_32_bytes(half + 64 * i));
        };
        const __m256i a = _mm256_srli_epi16(high(0), 2), b = _mm256_srli_epi16(high(1), 4);
        return _mm256_or_si256(_mm256_or_si256(a, b), _mm256_srli_epi16(high(2), 6));
    }
    static __m256i nibble(__m256i bytes) { return _mm256_and_si256(bytes, _mm256_set1_epi8(15)); }

    // For the compiler, which otherwise keeps what two calls load alike, and sums as a tree: more than
    // 16 registers hold, and a block takes a third longer (benchmarks/results/decoder.md).
    template <class T>
    static void load_anew(const uint8_t*& block, const T*& q) {
        asm("" : "+r"(block), "+r"(q));
    }
    static void in_this_order(__m256i& sum) { asm("" : : "x"(sum)); }

    // A block of nibbles or sixes as bytes, of a codebook's as those that they stand for.
    template <Codes C>
    static void unpack(const TileView& w, const uint8_t* block, uint8_t* bytes) {
        const __m256i table = _mm256_broadcastsi128_si256(load_16_bytes(w.values8));
        for (int half = 0; half < 2; ++half)
            for (int j = 0; j < 4; ++j)
                for (int p = 0; p < 2; ++p, bytes += lanes * 4) {
                    const __m256i code = codes<C>(block, half, j, p);
                    _mm256_store_si256(
                        reinterpret_cast<__m256i*>(bytes),
                        C == Codes::nibble_table ? _mm256_shuffle_epi8(table, code) : code);
                }
    }

    // The dot products of half-blocks First..Last-1, of nibbles, the bytes that unpack() made of them, or a
    // byte's high bits, with R rows of x, P vectors of the tile's rows. Pairs of products are summed in 16
    // bits: of nibbles 8 chunks reach 8 * 2 * 15 * 127 = 30480, of high bits what write_bounds() allows.
    template <Codes C, int First, int Last, int P, int R>
    SHALLOW_INLINE static void dots(const TileView&, const uint8_t* block, const int8_t* q,
                                    F (&out)[P][R], int64_t apart = kBlock) {
        load_anew(block, q);
        if constexpr (C == Codes::six || C == Codes::unpacked)
            return dots_of_sixes<C, First, Last>(block, q, out, apart);
        __m256i pairs[P][R];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            __m256i code[P][2];
            for (int p = 0; p < P; ++p) load_codes<C, First, Last>(block, j, p, code[p]);
#pragma GCC unroll 2
            for (int half = First; half < Last; ++half) {
#pragma GCC unroll 8
                for (int i = 0; i < R; ++i) {
                    const __m256i x = word(q + i * apart + 16 * (half - First) + 4 * j);
                    for (int p = 0; p < P; ++p) {
                        const __m256i more = _mm256_maddubs_epi16(code[p][half], x);
                        const bool first = j == 0 && half == First;
                        pairs[p][i] = first ? more : _mm256_add_epi16(pairs[p][i], more);
                        in_this_order(pairs[p][i]);
                    }
                }
            }
        }
        for (int i = 0; i < R; ++i)
            for (int p = 0; p < P; ++p)
                out[p][i] =
                    _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs[p][i], _mm256_set1_epi16(1)));
    }
    // The same of sixes, or the bytes that unpack() made of them: two chunks reach 4 * 63 * 127 = 32004.
    template <Codes C, int First, int Last, int P, int R>
    SHALLOW_INLINE static void dots_of_sixes(const uint8_t* block, const int8_t* q, F (&out)[P][R],
                                             int64_t apart) {
        __m256i sums[P][R];
#pragma GCC unroll 4
        for (int j = 4 * First; j < 4 * Last; j += 2) {
            __m256i code[P][2];
            for (int p = 0; p < P; ++p)
                for (int i = 0; i < 2; ++i) code[p][i] = codes<C>(block, j / 4, j % 4 + i, p);
#pragma GCC unroll 8
            for (int i = 0; i < R; ++i) {
                const int8_t* const at = q + i * apart + 4 * (j - 4 * First);
                const __m256i x = word(at), other = word(at + 4);
                for (int p = 0; p < P; ++p) {
                    const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(code[p][0], x),
                                                           _mm256_maddubs_epi16(code[p][1], other));
                    const __m256i more = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
                    sums[p][i] = j == 4 * First ? more : _mm256_add_epi32(sums[p][i], more);
                    in_this_order(sums[p][i]);
                }
            }
        }
        for (int i = 0; i < R; ++i)
            for (int p = 0; p < P; ++p) out[p][i] = _mm256_cvtepi32_ps(sums[p][i]);
    }
    // The same of bytes, or of a codebook's, and x in 16 bits: two steps of products for one of nibbles,
    // whose sums fit, and x needs no second plane. Four bits of a byte at a time, and before that its
    // magnitude and sign, took half as long again.
    template <Codes C, int First, int Last, int P, int R>
    SHALLOW_INLINE static void dots(const TileView& w, const uint8_t* block, const int16_t* q,
                                    F (&out)[P][R], int64_t apart = kBlock) {
        load_anew(block, q);
        __m256i sums[P][R];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j)
#pragma GCC unroll 2
            for (int half = First; half < Last; ++half) {
                __m256i even[P], odd[P];
                for (int p = 0; p < P; ++p) {
                    __m256i code = codes<C>(block, half, j, p);
                    if constexpr (C == Codes::nibble_table)
                        code = _mm256_shuffle_epi8(
                            _mm256_broadcastsi128_si256(load_16_bytes(w.values8)), code);
                    even[p] = _mm256_and_si256(code, _mm256_set1_epi16(255));
                    odd[p] = _mm256_srli_epi16(code, 8);
                }
#pragma GCC unroll 8
                for (int i = 0; i < R; ++i) {
                    const int16_t* const at = q + i * apart + 16 * (half - First) + 4 * j;
                    const __m256i x = word(at), other = word(at + 2);
                    for (int p = 0; p < P; ++p) {
                        const __m256i more = _mm256_madd_epi16(even[p], x);
                        const bool first = j == 0 && half == First;
                        sums[p][i] = first ? more : _mm256_add_epi32(sums[p][i], more);
                        in_this_order(sums[p][i]);
                        sums[p][i] = _mm256_add_epi32(sums[p][i], _mm256_madd_epi16(odd[p], other));
                        in_this_order(sums[p][i]);
                    }
                }
            }
        for (int i = 0; i < R; ++i)
            for (int p = 0; p < P; ++p) out[p][i] = _mm256_cvtepi32_ps(sums[p][i]);
    }
    static __m256i word(const void* p) {
        int bits;
        std::memcpy(&bits, p, sizeof bits);
        return _mm256_set1_epi32(bits);
    }

    // Chunk j of a block's eight, the code of column 4 j + byte at bit 8 * byte.
    template <Codes C>
    static __m256i chunk(const uint8_t* block, int j) {
        if (C == Codes::byte || C == Codes::six) return codes<C>(block, j / 4, j % 4, 0);
        const __m256i both = load_32_bytes(block + 64 * (j % 4));
        return j < 4 ? both : _mm256_srli_epi32(both, 4);
    }
    template <Codes C>
    static F code(const TileView& w, __m256i chunk, int byte) {
        const __m256i shifted = _mm256_srli_epi32(chunk, 8 * byte);
        if (C == Codes::nibble_table) {  // two lookups of 3 bits, chosen by the fourth
            const F low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(w.values), shifted);
            const F high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(w.values + 8), shifted);
            return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(shifted, 28)));
        }
        const __m256i mask = _mm256_set1_epi32(C == Codes::nibble ? 15 : 255);
        return _mm256_cvtepi32_ps(_mm256_and_si256(shifted, mask));
    }

    // count elements, zeros up to 32.
    static void widen(const void* from, ScaleType type, float* to, int count) {
        const std::size_t size = element_bytes(type);
        alignas(32) uint8_t raw[kBlock * 4];
        if (count < kBlock) {
            std::memset(raw, 0, sizeof raw);
            std::memcpy(raw, from, static_cast<std::size_t>(count) * size);
            from = raw;
        }
        for (std::size_t j = 0; j < kBlock; j += lanes)
            _mm256_storeu_ps(to + j, load(static_cast<const uint8_t*>(from) + j * size, type));
    }

    static int horizontal_sum(__m256i v) {
        __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
        s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
        return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
    }
    static int horizontal_max(__m256i v) {
        __m128i s = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
        s = _mm_max_epi32(s, _mm_shuffle_epi32(s, 0x4e));
        return _mm_cvtsi128_si32(_mm_max_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
    }

    // 32 floats -> integers up to `most`, and the scale.
    static float quantize(const float* x, float most, __m256i (&v)[4]) {
        // As integers, so that NaN counts as larger than infinity and spoils the scale.
        const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
        __m256i largest = _mm256_setzero_si256();
        for (int j = 0; j < 4; ++j)
            largest =
                _mm256_max_epi32(largest, _mm256_and_si256(load_32_bytes(x + 8 * j), magnitude));
        const int bits = horizontal_max(largest);
        float peak;
        std::memcpy(&peak, &bits, sizeof peak);
        const bool tiny = peak < kTiny;
        const F inverse = set(tiny ? 0.0f : most / peak);
        for (int j = 0; j < 4; ++j)
            v[j] = _mm256_cvtps_epi32(mul(_mm256_loadu_ps(x + 8 * j), inverse));
        return tiny ? 0.0f : peak / most;
    }
    static float quantize(const float* x, int8_t* q, std::int32_t* sums, float most = 127) {
        __m256i v[4];
        const float scale = quantize(x, most, v);
        // packs works within 128-bit lanes and leaves four-byte groups as 0 2 4 6 1 3 5 7
        const __m256i words =
            _mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
        const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        const __m256i bytes = _mm256_permutevar8x32_epi32(words, order);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(q), bytes);
        // of 8 bytes each, without a sign: 128 more
        __m256i sum = _mm256_sad_epu8(_mm256_xor_si256(bytes, _mm256_set1_epi8(-128)),
                                      _mm256_setzero_si256());
        sum = _mm256_add_epi32(sum, _mm256_shuffle_epi32(sum, 0x4e));
        sums[0] = _mm_cvtsi128_si32(_mm256_castsi256_si128(sum)) - 16 * 128;
        sums[1] = _mm_cvtsi128_si32(_mm256_extracti128_si256(sum, 1)) - 16 * 128;
        return scale;
    }
    // Even columns beside each other, and odd ones, as dots() meets them.
    static float quantize(const float* x, int16_t* q, std::int32_t* sums) {
        __m256i v[4];
        const float scale = quantize(x, 32767.0f, v);
        sums[0] = horizontal_sum(_mm256_add_epi32(v[0], v[1]));
        sums[1] = horizontal_sum(_mm256_add_epi32(v[2], v[3]));
        for (int j = 0; j < 4; j += 2) {
            const __m256i words = _mm256_packs_epi32(_mm256_shuffle_epi32(v[j], 0xd8),
                                                     _mm256_shuffle_epi32(v[j + 1], 0xd8));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(q + 8 * j),
                                _mm256_permute4x64_epi64(words, 0xd8));
        }
        return scale;
    }
};

}  // namespace
}  // namespace shallow
