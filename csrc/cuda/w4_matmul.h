// y = x W^T for 1 to 8 rows of x and a packed matrix W (csrc/w4.h): the matmul of decoding.
// defines: shallow::Norm, Activation, W4Matmul, w4_matmul, prepare_w4_matmul
#pragma once

#include <cstdint>
#include <type_traits>

#include "w4.h"

namespace shallow {

constexpr int kW4MaxRows = 8;
constexpr int kW4SliceColumns = 512;

enum class Norm : std::int32_t { none, rms, layer };
enum class Activation : std::int32_t { none, silu, gelu, gelu_tanh, relu };

// Mirrored by kernels/w4/cuda.py. Rows of x, delta and stream lie x_stride elements apart, rows of y,
// gate and add y_stride. What becomes of x and y is kernels/layer/README.md's:
//   x + delta / rms(delta) * post goes to `stream`; its norm, rounded to `type`, meets W;
//   bias; activation, of the gate that W stacks before an up projection where `gated` (y then has
//   n / 2 columns), or of `gate`, times the product; cap; 0 for rows that are not live; add.
// A block takes a slice of kW4SliceColumns columns of W, and shares its tiles of 16 rows with `ranges`
// blocks. Where there are several slices, their sums meet in `parts`, where the last adds them up.
struct W4Matmul {
    w4::Matrix weights;        // its codes in the order of kernels/w4/layout_gpu.py
    const void* x;             // (m, k) x_type
    const float* delta;        // null, or (m, k)
    const float* post;         // (k,), with delta
    float* stream;             // (m, k), with delta
    const float* norm;         // (k,), with a norm
    const float* norm_bias;    // null, or (k,)
    const void* bias;          // null, or (n,) type
    const float* gate;         // null, or as y
    const float* add;          // null, or as y, which may be y
    const std::int32_t* live;  // null, or (m,)
    void* y;                   // (m, n) y_type
    const float* sums;         // null, or (sum_parts, 2, m): of x's squares and values, in parts
    float* out_sums;           // null, or (tiles, 2, m): the same of y
    float* parts;              // (slices, tiles, m, 16)
    std::int32_t* counters;    // (tiles,) zeros, and zeros again afterwards
    std::int64_t x_stride, y_stride, sum_parts;
    std::int32_t m;        // 1 to 8
    w4::ScaleType type;    // of products: float16 or bfloat16
    w4::ScaleType x_type;  // type or float32
    w4::ScaleType y_type;  // type or float32
    Norm norm_kind;
    Activation activation;
    float norm_eps;
    float cap;  // 0: none
    std::int32_t gated;
    std::int32_t ranges;
    std::int32_t overlap;  // start before the previous kernel ends: compute capability >= 9.0
};

static_assert(std::is_trivially_copyable<W4Matmul>::value, "filled from Python");
static_assert(sizeof(W4Matmul) == sizeof(w4::Matrix) + 18 * 8 + 12 * 4, "no padding");

// Launches on the current device and writes y in full; with m = 0 launches nothing. Throws
// std::invalid_argument for arguments it cannot take, std::runtime_error with CUDA's own message.
void w4_matmul(const W4Matmul& call, void* stream);

// Loads every variant of the kernel on the current device: before a stream capture, which forbids
// it. Throws std::runtime_error with CUDA's own message.
void prepare_w4_matmul();

}  // namespace shallow
