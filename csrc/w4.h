// The packed group format of quantized weights (drawn in kernels/w4/README.md) for C++ and CUDA.
// defines: w4::Scheme, w4::ScaleType, w4::has_supers, w4::element_bytes, w4::half_to_float,
//          w4::float_to_half, w4::bfloat_to_float, w4::Matrix, and what they need
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __CUDACC__
#define W4_HD __host__ __device__
#else
#define W4_HD
#endif

namespace w4 {

constexpr std::int64_t kRowAlignBytes = 16;  // a row of codes is read in 16-byte loads
constexpr std::int64_t kSuper = 256;         // weights under one pair of kquant super-scales

// stepped: of tiles alone (cpu/w4_matmul.h), symmetric with scales in two parts, as GGUF's Q6_K.
enum class Scheme : std::int32_t { symmetric, zero, minimum, codebook, kquant, stepped };
enum class ScaleType : std::int32_t { float16, bfloat16, float32 };

constexpr int element_bytes(ScaleType type) { return type == ScaleType::float32 ? 4 : 2; }

// Whether scales are steps of a float16 that 256 weights share.
constexpr bool has_supers(Scheme scheme) {
    return scheme == Scheme::kquant || scheme == Scheme::stepped;
}

W4_HD inline float bits_to_float(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

W4_HD inline float bfloat_to_float(std::uint16_t b) {
    return bits_to_float(static_cast<std::uint32_t>(b) << 16);
}

// Exact for every bit pattern, and free of float32 subnormals, which a thread may flush to zero.
W4_HD inline float half_to_float(std::uint16_t h) {
    const std::uint32_t sign = (h & 0x8000u) << 16;
    const std::uint32_t magnitude = h & 0x7fffu;
    if (magnitude < 0x0400u) {  // zero or subnormal: magnitude * 2^-24
        const float value = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
        return sign ? -value : value;
    }
    const std::uint32_t bias = magnitude >= 0x7c00u ? 224u << 23 : 112u << 23;
    return bits_to_float(sign | ((magnitude << 13) + bias));
}

// a * b rounded to float: never fused into the sum that follows.
W4_HD inline float product(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fmul_rn(a, b);
#else
    volatile float rounded = a * b;
    return rounded;
#endif
}

W4_HD constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

W4_HD constexpr std::int64_t row_bytes(std::int64_t k, int bits) {
    return ceil_div(k * bits, 8 * kRowAlignBytes) * kRowAlignBytes;
}

static_assert(row_bytes(1, 4) == 16 && row_bytes(32, 4) == 16 && row_bytes(33, 4) == 32);
static_assert(row_bytes(16, 8) == 16 && row_bytes(17, 8) == 32);

inline std::uint16_t float_to_half(float v) {  // to the nearest, ties to even
    std::uint32_t bits;
    std::memcpy(&bits, &v, sizeof bits);
    const std::uint32_t sign = bits >> 16 & 0x8000u;
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);
    if (bits >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);
    if (bits < 0x38800000u)  // subnormal: multiples of 2^-24
        return static_cast<std::uint16_t>(
            sign | static_cast<std::uint32_t>(std::lrint(std::fabs(v) * 16777216.0f)));
    return static_cast<std::uint16_t>(sign |
                                      ((bits - 0x38000000u + 0xfffu + (bits >> 13 & 1)) >> 13));
}

// Whether each of k columns is one of the matrix's: what is read and written by a perm is not checked.
inline bool are_columns(const std::int32_t* perm, std::int64_t k) {
    for (std::int64_t j = 0; j < k; ++j)
        if (perm[j] < 0 || perm[j] >= k) return false;
    return true;
}

// One matrix W, (n, k). Borrows its memory. All arrays are contiguous; absent ones are null.
struct Matrix {
    const std::uint8_t* codes;    // (n, row_bytes)
    const void* scales;           // (n, groups) scale_type; kquant: uint8, 6 bits used
    const std::uint8_t* zeros;    // zero: (n, groups)
    const void* mins;             // minimum: (n, groups) scale_type; kquant: uint8, 6 bits used
    const std::uint16_t* supers;  // kquant: (n, ceil(k / 256), 2) float16 d, dmin
    const float* codebook;        // codebook: (16,)
    const std::int32_t* perm;     // null, or (k,): stored column j is input perm[j]
    std::int64_t n, k;
    std::int32_t bits;   // 4, 8; of tiles alone 6
    std::int32_t group;  // 16, 32, 64, 128; 0 is the whole row
    Scheme scheme;
    ScaleType scale_type;

    W4_HD std::int64_t group_width() const { return group ? group : k; }
    W4_HD std::int64_t groups() const { return ceil_div(k, group_width()); }
    W4_HD std::int64_t row_bytes() const { return w4::row_bytes(k, bits); }

    // The code at stored column j.
    W4_HD std::uint32_t code(std::int64_t row, std::int64_t j) const {
        const std::uint8_t* line = codes + row * row_bytes();
        return bits == 8 ? line[j] : (line[j >> 1] >> (4 * (j & 1))) & 15u;
    }

    // Element i of scales or mins as float.
    W4_HD float load(const void* array, std::int64_t i) const {
        if (scheme == Scheme::kquant) return static_cast<const std::uint8_t*>(array)[i];
        if (scale_type == ScaleType::float32) return static_cast<const float*>(array)[i];
        const std::uint16_t stored = static_cast<const std::uint16_t*>(array)[i];
        return scale_type == ScaleType::float16 ? half_to_float(stored) : bfloat_to_float(stored);
    }

    // The weight at stored column j, bit for bit what kernels/w4/format.py unpacks.
    W4_HD float value(std::int64_t row, std::int64_t j) const {
        const std::int64_t i = row * groups() + j / group_width();
        const int q = static_cast<int>(code(row, j));
        const float scale = load(scales, i);
        switch (scheme) {
            case Scheme::symmetric: return static_cast<float>(q - (1 << (bits - 1))) * scale;
            case Scheme::zero: return static_cast<float>(q - zeros[i]) * scale;
            case Scheme::minimum: return product(static_cast<float>(q), scale) + load(mins, i);
            case Scheme::codebook: return codebook[q] * scale;
            case Scheme::kquant:
            case Scheme::stepped: break;
        }
        const std::uint16_t* super = supers + 2 * (row * ceil_div(k, kSuper) + j / kSuper);
        const float step = product(half_to_float(super[0]), scale);
        const float minimum = product(half_to_float(super[1]), load(mins, i));
        return product(step, static_cast<float>(q)) - minimum;
    }

    // Row `row` in the original column order, k floats.
    W4_HD void unpack_row(std::int64_t row, float* out) const {
        for (std::int64_t j = 0; j < k; ++j) out[perm ? perm[j] : j] = value(row, j);
    }
};

static_assert(std::is_trivially_copyable<Matrix>::value, "passed by value to CUDA kernels");
static_assert(sizeof(void*) != 8 || sizeof(Matrix) == 7 * 8 + 2 * 8 + 4 * 4, "no padding");

}  // namespace w4
