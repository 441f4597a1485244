// 4 rows a vector, for NEON, by what the processor has for products of bytes.
#pragma once

#include <arm_neon.h>

#include <cstring>

#include "cpu/w4_kernel.h"

namespace shallow {
namespace {

enum class Bytes { plain, dotprod, i8mm };

template <Bytes B>
struct Neon {
    using F = float32x4_t;
    static constexpr int lanes = 4, max_rows = 4;  // 16 sums and 8 vectors of codes: 32 registers
    static constexpr bool unpacks = false, keeps_codes = true, keeps_supers = false, words = false;
    template <Codes C>
    static constexpr int most_rows = max_rows;

    static F set(float v) { return vdupq_n_f32(v); }
    static F add(F a, F b) { return vaddq_f32(a, b); }
    static F mul(F a, F b) { return vmulq_f32(a, b); }
    static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }

    static F load_bytes(const void* p) {
        std::uint32_t bytes;
        std::memcpy(&bytes, p, sizeof bytes);
        const uint16x8_t words = vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(bytes)));
        return vcvtq_f32_u32(vmovl_u16(vget_low_u16(words)));
    }
    static F load_steps(const void* p) {
        std::int32_t bytes;
        std::memcpy(&bytes, p, sizeof bytes);
        const int16x8_t words = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(bytes)));
        return vcvtq_f32_s32(vmovl_s16(vget_low_s16(words)));
    }
    static F load_half(const void* p) {
        float16x4_t halves;
        std::memcpy(&halves, p, sizeof halves);
        return vcvt_f32_f16(halves);
    }
    static F load(const void* p, ScaleType type) {
        if (type == ScaleType::float16) return load_half(p);
        if (type == ScaleType::float32) return vld1q_f32(static_cast<const float*>(p));
        uint16x4_t words;
        std::memcpy(&words, p, sizeof words);
        return vreinterpretq_f32_u32(vshll_n_u16(words, 16));
    }
    static F load_some(const float* p, int count) {
        float values[lanes] = {};
        std::memcpy(values, p, static_cast<std::size_t>(count) * sizeof *p);
        return vld1q_f32(values);
    }
    static void store_all(float* p, F v) { vst1q_f32(p, v); }
    static void store(void* p, ScaleType type, F v, int count) {
        if (type == ScaleType::float32) {
            float values[lanes];
            vst1q_f32(values, v);
            std::memcpy(p, values, static_cast<std::size_t>(count) * sizeof *values);
            return;
        }
        const uint16x4_t words =
            type == ScaleType::float16 ? vreinterpret_u16_f16(vcvt_f16_f32(v)) : to_bfloat(v);
        std::memcpy(p, &words, static_cast<std::size_t>(count) * 2);
    }
    static uint16x4_t to_bfloat(F v) {  // to the nearest, ties to even; NaN stays one
        const uint32x4_t raw = vreinterpretq_u32_f32(v), high = vshrq_n_u32(raw, 16);
        const uint32x4_t half = vaddq_u32(vandq_u32(high, vdupq_n_u32(1)), vdupq_n_u32(0x7fff));
        const uint32x4_t rounded = vshrq_n_u32(vaddq_u32(raw, half), 16);
        const uint32x4_t quiet = vorrq_u32(high, vdupq_n_u32(0x40));
        return vmovn_u32(vbslq_u32(vceqq_f32(v, v), rounded, quiet));
    }

    // 4 rows x 2 columns of bfloat16
    static void load_pairs(const void* p, F& even, F& odd) {
        const uint32x4_t pairs = vreinterpretq_u32_u8(vld1q_u8(static_cast<const uint8_t*>(p)));
        even = vreinterpretq_f32_u32(vshlq_n_u32(pairs, 16));
        odd = vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xffff0000u)));
    }

    // 4 rows x 4 columns of codes, chunk j of a block's eight.
    template <Codes C>
    static uint8x16_t bytes_of(const uint8_t* block, int j) {
        if constexpr (C == Codes::byte) return vld1q_u8(block + 64 * j);
        if constexpr (C == Codes::six) {
            const uint8_t* const half = block + j / 4 * 192;
            if (j % 4 < 3) return vandq_u8(vld1q_u8(half + j % 4 * 64), vdupq_n_u8(63));
            const uint8x16_t top = vsriq_n_u8(vld1q_u8(half), vld1q_u8(half + 64), 2);
            return vshrq_n_u8(vsriq_n_u8(top, vld1q_u8(half + 128), 4), 2);
        }
        const uint8x16_t both = vld1q_u8(block + 64 * (j % 4));
        return j < 4 ? vandq_u8(both, vdupq_n_u8(15)) : vshrq_n_u8(both, 4);
    }

    template <Codes C, int Halves>
    struct Columns {
        uint8x16_t chunk[4 * Halves];
    };
    template <Codes C, int First, int Last, int R>  // one instruction shifts and clears
    static Columns<C, Last - First> codes(const TileView& w, const uint8_t* block) {
        Columns<C, Last - First> out;
        for (int j = 4 * First; j < 4 * Last; ++j) {
            uint8x16_t& chunk = out.chunk[j - 4 * First];
            chunk = bytes_of<C>(block, j);
            if constexpr (C == Codes::nibble_table) chunk = vqtbl1q_u8(vld1q_u8(w.values8), chunk);
        }
        return out;
    }
    template <Codes C, int Halves>
    static F dot(const Columns<C, Halves>& codes, const int8_t* q) {
        int32x4_t sum = vdupq_n_s32(0);
        for (int j = 0; j < 4 * Halves; ++j) {
            std::int32_t word;  // 4 columns of x, for every row
            std::memcpy(&word, q + 4 * j, sizeof word);
            sum = add_products<C>(sum, codes.chunk[j], vreinterpretq_s8_s32(vdupq_n_s32(word)));
        }
        return vcvtq_f32_s32(sum);
    }
    // Nibbles and sixes are signed bytes too; other codes, 0..255, are taken as 128 less where no instruction
    // multiplies them by signed bytes, and 128 x is added as two times 64 x.
    template <Codes C>
    static int32x4_t add_products(int32x4_t sum, uint8x16_t codes, int8x16_t x) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
        if constexpr (B == Bytes::i8mm) return vusdotq_s32(sum, codes, x);
#endif
        if constexpr (C == Codes::nibble || C == Codes::six)
            return signed_products(sum, vreinterpretq_s8_u8(codes), x);
        const int8x16_t less = vreinterpretq_s8_u8(veorq_u8(codes, vdupq_n_u8(128)));
        const int8x16_t shift = vdupq_n_s8(64);
        sum = signed_products(sum, less, x);
        return signed_products(signed_products(sum, shift, x), shift, x);
    }
    // To each of 4 sums the products of 4 bytes.
    static int32x4_t signed_products(int32x4_t sum, int8x16_t a, int8x16_t b) {
#if defined(__ARM_FEATURE_DOTPROD)
        if constexpr (B != Bytes::plain) return vdotq_s32(sum, a, b);
#endif
        const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)));
        const int32x4_t high = vpaddlq_s16(vmull_high_s8(a, b));
        return vaddq_s32(sum, vpaddq_s32(low, high));
    }

    // The code of column 4 j + byte at bit 8 * byte.
    template <Codes C>
    static uint32x4_t chunk(const uint8_t* block, int j) {
        return vreinterpretq_u32_u8(bytes_of<C>(block, j));
    }
    template <Codes C>
    static F code(const TileView& w, uint32x4_t chunk, int byte) {
        const uint32x4_t codes =
            vandq_u32(vshlq_u32(chunk, vdupq_n_s32(-8 * byte)), vdupq_n_u32(255));
        if constexpr (C != Codes::nibble_table) return vcvtq_f32_u32(codes);
        float values[lanes];
        std::uint32_t which[lanes];
        vst1q_u32(which, codes);
        for (int i = 0; i < lanes; ++i) values[i] = w.values[which[i]];
        return vld1q_f32(values);
    }

    // count elements, zeros up to 32.
    static void widen(const void* from, ScaleType type, float* to, int count) {
        const std::size_t size = element_bytes(type);
        uint8_t raw[kBlock * 4] = {};
        std::memcpy(raw, from, static_cast<std::size_t>(count) * size);
        for (std::size_t j = 0; j < kBlock; j += lanes)
            vst1q_f32(to + j, load(raw + j * size, type));
    }

    // 32 floats -> int8, the scale, and the sums of both halves.
    static float quantize(const float* x, int8_t* q, std::int32_t* sums) {
        F largest = vdupq_n_f32(0);  // NaN where one is
        for (int j = 0; j < kBlock; j += lanes)
            largest = vmaxq_f32(largest, vabsq_f32(vld1q_f32(x + j)));
        const float peak = vmaxvq_f32(largest);
        const bool tiny = peak < kTiny;
        const F inverse = set(tiny ? 0.0f : 127.0f / peak);
        for (int half = 0; half < 2; ++half) {
            sums[half] = 0;
            for (int j = 16 * half; j < 16 * half + 16; j += 8) {
                const int32x4_t a = vcvtnq_s32_f32(mul(vld1q_f32(x + j), inverse));
                const int32x4_t b = vcvtnq_s32_f32(mul(vld1q_f32(x + j + 4), inverse));
                sums[half] += vaddvq_s32(vaddq_s32(a, b));
                vst1_s8(q + j, vqmovn_s16(vcombine_s16(vqmovn_s32(a), vqmovn_s32(b))));
            }
        }
        return tiny ? 0.0f : peak / 127.0f;
    }
};

}  // namespace
}  // namespace shallow
