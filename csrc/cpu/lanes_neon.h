// 4 floats a vector, for NEON on 64-bit ARM.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace shallow {
namespace {

struct Lanes {
    using F = float32x4_t;
    static constexpr int count = 4;
    static constexpr int wide = 4;  // 6 rows by 4 vectors of sums are 24 of 32 registers

    static F set(float v) { return vdupq_n_f32(v); }
    static F add(F a, F b) { return vaddq_f32(a, b); }
    static F sub(F a, F b) { return vsubq_f32(a, b); }
    static F mul(F a, F b) { return vmulq_f32(a, b); }
    static F div(F a, F b) { return vdivq_f32(a, b); }
    static F max(F a, F b) { return vmaxq_f32(a, b); }  // NaN where either is, as min
    static F min(F a, F b) { return vminq_f32(a, b); }
    static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
    static F abs(F v) { return vabsq_f32(v); }
    static F sign_of(F magnitude, F sign) {
        return vbslq_f32(vdupq_n_u32(0x80000000u), sign, magnitude);
    }
    static F round(F v) { return vrndnq_f32(v); }
    static F scale(F v, F n) {
        const int32x4_t exponent = vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127));
        return mul(v, vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23)));
    }

    static float sum(F v) { return vaddvq_f32(v); }
    static float peak(F v) { return vmaxvq_f32(v); }

    static F load(const float* p) { return vld1q_f32(p); }
    static F load(const std::uint16_t* p) {
        return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
    }
    static F load(const std::int8_t* p) {
        std::int32_t bytes;
        std::memcpy(&bytes, p, sizeof bytes);
        const int16x8_t words = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(bytes)));
        return vcvtq_f32_s32(vmovl_s16(vget_low_s16(words)));
    }
    static void store(float* p, F v) { vst1q_f32(p, v); }
    static void store(std::uint16_t* p, F v) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(v))); }
    static void store(std::int8_t* p, F v) {
        const int16x4_t words = vqmovn_s32(vcvtnq_s32_f32(v));
        const int8x8_t bytes = vqmovn_s16(vcombine_s16(words, words));
        const std::int32_t four = vget_lane_s32(vreinterpret_s32_s8(bytes), 0);
        std::memcpy(p, &four, sizeof four);
    }

    static F load(const float* p, std::int64_t some) {
        float values[count] = {};
        std::memcpy(values, p, static_cast<std::size_t>(some) * sizeof *p);
        return load(values);
    }
    static void store(float* p, F v, std::int64_t some) {
        float values[count];
        store(values, v);
        std::memcpy(p, values, static_cast<std::size_t>(some) * sizeof *p);
    }
    static F first(F v, std::int64_t some) {
        float values[count];
        store(values, v);
        return load(values, some);
    }
};

}  // namespace
}  // namespace shallow
