// What a decoder does to one row of float32 between its matmuls.
// defines: Norm Activation RowKernels row_kernels
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace shallow {

struct Norm {
    const float* weight;  // (n,)
    const float* bias;    // null or (n,)
    float eps;
    bool centred;  // LayerNorm; else RMSNorm
};

enum class Activation : int { silu, gelu, gelu_tanh, relu };

// Rows of n floats. Input and output are one row or do not overlap.
struct RowKernels {
    void (*normalise)(const Norm& norm, const float* x, float* out, std::int64_t n);
    void (*add)(float* x, const float* y, std::int64_t n);  // x += y
    void (*scale)(float* x, float factor, std::int64_t n);
    // x = activation(gate) * x, or activation(x) where gate is null
    void (*activate)(Activation activation, const float* gate, float* x, std::int64_t n);
    // Turns the pairs (x[i], x[i + half]) by angle i; angles: half cosines, then half sines.
    void (*rotate)(float* x, const float* angles, std::int64_t half);
    void (*softcap)(float* x, float cap, std::int64_t n);  // cap * tanh(x / cap)
    // The lowest index of the largest; -1 where one is NaN.
    std::int64_t (*largest)(const float* x, std::int64_t n);
};

#if defined(SHALLOW_X86)
extern const RowKernels kRowsAvx2, kRowsAvx512;
#elif defined(SHALLOW_ARM)
extern const RowKernels kRowsNeon;
#endif
extern const RowKernels kRowsGeneric;
const RowKernels& row_kernels(Isa isa);  // of the widest kind that `isa` includes

}  // namespace shallow
