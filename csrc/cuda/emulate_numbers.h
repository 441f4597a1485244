// CUDA's functions of numbers on a CPU; a part of emulate.h.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <cstring>

inline std::uint32_t __float_as_uint(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline float __uint_as_float(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline std::uint32_t __byte_perm(std::uint32_t x, std::uint32_t y, std::uint32_t selector) {
    const std::uint64_t bytes = static_cast<std::uint64_t>(y) << 32 | x;
    std::uint32_t picked = 0;
    for (int i = 0; i < 4; ++i) {
        const std::uint32_t byte = bytes >> 8 * (selector >> 4 * i & 7) & 255;
        picked |= (selector >> 4 * i & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
    }
    return picked;
}

template <typename T>
T min(T a, T b) {
    return b < a ? b : a;
}

template <typename T>
T max(T a, T b) {
    return a < b ? b : a;
}

inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }
inline float __expf(float value) { return std::exp(value); }

// Rounded once: float64 holds the product, and the sum but for bits far below the result's last.
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
    const auto fma = [](__half x, __half y, __half z) {
        return __double2half(static_cast<double>(__half2float(x)) * __half2float(y) +
                             __half2float(z));
    };
    return {fma(a.x, b.x, c.x), fma(a.y, b.y, c.y)};
}

inline __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
    const auto fma = [](__nv_bfloat16 x, __nv_bfloat16 y, __nv_bfloat16 z) {
        return __double2bfloat16(static_cast<double>(__bfloat162float(x)) * __bfloat162float(y) +
                                 __bfloat162float(z));
    };
    return {fma(a.x, b.x, c.x), fma(a.y, b.y, c.y)};
}
