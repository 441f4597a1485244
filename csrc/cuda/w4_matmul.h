// y = x W^T for 1 to 8 rows of x and a packed matrix W (csrc/w4.h): the matmul of decoding.
// defines: shallow::W4Matmul, shallow::w4_matmul
#pragma once

#include <cstdint>
#include <type_traits>

#include "w4.h"

namespace shallow {

constexpr int kW4MaxRows = 8;

// Mirrored by kernels/w4/cuda.py. Rows of x lie x_stride elements apart, rows of y are contiguous.
// With `gated`, W stacks a gate and an up projection, and y = silu(gate) * up has n / 2 columns.
// With `norm`, x is first normalised: x / sqrt(mean(x^2) + norm_eps) * (norm + norm_offset).
struct W4Matmul {
    w4::Matrix weights;  // its codes in the order of kernels/w4/layout_gpu.py
    const void* x;       // (m, k) x_type
    const void* norm;    // null, or (k,) x_type
    const void* bias;    // null, or (n,) x_type
    void* y;             // (m, n), or (m, n / 2) where gated; y_type
    std::int64_t x_stride;
    std::int32_t m;        // 1 to 8
    w4::ScaleType x_type;  // float16 or bfloat16
    w4::ScaleType y_type;  // x_type or float32
    float norm_eps, norm_offset;
    std::int32_t gated;
    std::int32_t overlap;  // start before the previous kernel ends: compute capability >= 9.0
    std::int32_t reserved;
};

static_assert(std::is_trivially_copyable<W4Matmul>::value, "filled from Python");
static_assert(sizeof(W4Matmul) == sizeof(w4::Matrix) + 5 * 8 + 8 * 4, "no padding");

// Launches on the current device and writes y in full; with m = 0 launches nothing. Throws
// std::invalid_argument for arguments it cannot take, std::runtime_error with CUDA's own message.
void w4_matmul(const W4Matmul& call, void* stream);

// Loads every variant of the kernel on the current device: before a stream capture, which forbids
// it. Throws std::runtime_error with CUDA's own message.
void prepare_w4_matmul();

}  // namespace shallow
