// Codes to numbers, in registers.
// defines: shallow::widen, narrow, as_pair, as_bits, decode, look_up
#pragma once

#include "cuda/kernel.h"

namespace shallow {

constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline float widen(float v) { return v; }
__device__ inline float widen(__half v) { return __half2float(v); }
__device__ inline float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline void narrow(__half& to, float v) { to = __float2half_rn(v); }
__device__ inline void narrow(__nv_bfloat16& to, float v) { to = __float2bfloat16_rn(v); }

template <typename Pair>
__device__ Pair as_pair(std::uint32_t bits) {
    Pair pair;
    memcpy(static_cast<void*>(&pair), &bits, 4);
    return pair;
}

template <typename Pair>
__device__ std::uint32_t as_bits(Pair pair) {
    std::uint32_t bits;
    memcpy(&bits, &pair, 4);
    return bits;
}

__device__ inline std::uint32_t word_of(const uint4& v, int i) {
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// A word of codes, minus `bias`, to pairs of T in the order of K: 8 codes of 4 bits or 4 of 8.
//
// A code OR-ed into the last mantissa bits of 1024 (float16) or 128 (bfloat16) is added to it. In
// float16 there is room for four bits more, so odd codes need no shift: one FMA takes 16 from them.

__device__ inline void decode(std::uint32_t word, float bias, __half, std::uint32_t (&pairs)[4]) {
    const __half2 even_bias = __float2half2_rn(1024 + bias);
    const __half2 odd_bias = __float2half2_rn(-(64 + bias));
    const __half2 sixteenth = __float2half2_rn(1.0f / 16);
    for (int i = 0; i < 2; ++i) {
        const std::uint32_t shifted = word >> 8 * i;
        const auto even = as_pair<__half2>(and_or(shifted, 0x000f000fu, 0x64006400u));
        const auto odd = as_pair<__half2>(and_or(shifted, 0x00f000f0u, 0x64006400u));
        pairs[2 * i] = as_bits(__hsub2(even, even_bias));
        pairs[2 * i + 1] = as_bits(__hfma2(odd, sixteenth, odd_bias));
    }
}

__device__ inline void decode(std::uint32_t word, float bias, __nv_bfloat16,
                              std::uint32_t (&pairs)[4]) {
    const __nv_bfloat162 raise = __float2bfloat162_rn(128 + bias);
    for (int i = 0; i < 4; ++i) {
        const std::uint32_t raised = and_or(word >> 4 * i, 0x000f000fu, 0x43004300u);
        pairs[i] = as_bits(__hsub2(as_pair<__nv_bfloat162>(raised), raise));
    }
}

__device__ inline void decode(std::uint32_t word, float bias, __half, std::uint32_t (&pairs)[2]) {
    const __half2 raise = __float2half2_rn(1024 + bias);
    const auto low = as_pair<__half2>(__byte_perm(word, 0x64646464u, 0x4140));
    const auto high = as_pair<__half2>(__byte_perm(word, 0x64646464u, 0x4342));
    pairs[0] = as_bits(__hsub2(low, raise));
    pairs[1] = as_bits(__hsub2(high, raise));
}

// bfloat16 lacks mantissa for 8 bits and a leading one: through the last bits of 2^23 in float32.
__device__ inline void decode(std::uint32_t word, float bias, __nv_bfloat16,
                              std::uint32_t (&pairs)[2]) {
    float v[4];
    for (int i = 0; i < 4; ++i)
        v[i] = __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7540 + i)) - (8388608 + bias);
    pairs[0] = as_bits(__floats2bfloat162_rn(v[0], v[1]));
    pairs[1] = as_bits(__floats2bfloat162_rn(v[2], v[3]));
}

// `entry` is the codebook's entry lane % 16.
template <typename T>
__device__ void look_up(std::uint32_t word, T entry, std::uint32_t (&pairs)[4]) {
    std::uint16_t bits;
    memcpy(&bits, &entry, 2);
    for (int i = 0; i < 4; ++i) {
        const unsigned low = __shfl_sync(kAllLanes, unsigned{bits}, word >> 4 * i & 15);
        const unsigned high = __shfl_sync(kAllLanes, unsigned{bits}, word >> (4 * i + 16) & 15);
        pairs[i] = low | high << 16;
    }
}

}  // namespace shallow
