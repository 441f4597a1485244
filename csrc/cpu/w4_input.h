// Activations as the kernels read them, in terms of the vector type V of w4_kernel.h.
#pragma once

#include <cmath>

#include "cpu/w4_matmul.h"

namespace shallow {
namespace {

using std::int16_t;
using std::int64_t;
using std::int8_t;
using std::uint8_t;

// Without it each group, which may be one block, is a call with its vectors by way of memory: a block
// takes 9.5 instead of 6.8 ns, both from L2 (benchmarks/results/decoder.md).
#define SHALLOW_INLINE __attribute__((always_inline)) inline

constexpr float kTiny =
    1e-30f;  // below this, and well above where 127 / peak overflows, all is zero

inline const uint8_t* element(const Rows& x, int64_t row, int64_t column) {
    const int64_t size = element_bytes(x.type);
    return static_cast<const uint8_t*>(x.data) + (row * x.stride + column) * size;
}

// Rounds one row of x to integers T; to int8, where asked, also what that leaves of the blocks whose
// step is not below the RMS of all: a sixth of the blocks of a trained model's norms, with most of the
// error.
template <class V, class T>
struct RowRounding {
    const Rows& x;
    const IntInput<T> to;
    int64_t row, blocks;
    T* q;  // of the row's first block, as are the scales and sums
    float *scales, *sums;

    RowRounding(const Rows& x, const IntInput<T>& to, int64_t row)
        : x(x), to(to), row(row), blocks(w4::ceil_div(x.k, kBlock)), q(to.q + row * kBlock),
          scales(to.scales + row), sums(to.sums + row) {}

    void run() const {
        clear_sums();
        float squares = 0;
        each_block([&](int64_t b, float* sum) {
            alignas(64) float values[kBlock];
            load(b, values);
            const float scale = round(values, b * to.panel, sum);
            squares += scale * scale;
        });
        if constexpr (sizeof(T) > 1) return;
        // Equal steps are all their RMS, on whatever side of it the sum was rounded to.
        const float limit = to.fine ? (1 - 1e-4f) * squares / static_cast<float>(blocks) : INFINITY;
        each_block([&](int64_t b, float* sum) {
            const int64_t at = b * to.panel;
            scales[to.plane + at] = 0;
            if (scales[at] * scales[at] < limit) return;
            alignas(64) float values[kBlock];
            load(b, values);
            for (int j = 0; j < kBlock; ++j) values[j] -= scales[at] * q[at * kBlock + j];
            round(values, to.plane + at, sum);
        });
    }
    void clear_sums() const {
        const int64_t groups = to.group_blocks ? w4::ceil_div(blocks, to.group_blocks) : 2 * blocks;
        for (int64_t g = 0; g < groups; ++g) sums[g * to.panel] = 0;
    }
    // call(block, its first group's sum)
    template <class Call>
    SHALLOW_INLINE void each_block(const Call& call) const {
        float* sum = sums;
        for (int64_t b = 0, left = to.group_blocks; b < blocks; ++b) {
            call(b, sum);
            if (to.group_blocks == 0) sum += 2 * to.panel;
            if (--left == 0) sum += to.panel, left = to.group_blocks;
        }
    }
    SHALLOW_INLINE void load(int64_t b, float* values) const {
        const int64_t left = x.k - b * kBlock;
        V::widen(element(x, row, b * kBlock), x.type, values,
                 static_cast<int>(left < kBlock ? left : kBlock));
    }
    SHALLOW_INLINE float round(const float* values, int64_t at, float* sum) const {
        std::int32_t halves[2];
        const float scale = V::quantize(values, q + at * kBlock, halves);
        scales[at] = scale;
        if (to.group_blocks) {
            *sum += scale * static_cast<float>(halves[0] + halves[1]);
        } else {
            sum[0] += scale * static_cast<float>(halves[0]);
            sum[to.panel] += scale * static_cast<float>(halves[1]);
        }
        return scale;
    }
};

template <class V, class T>
void write_int(const Rows& x, const IntInput<T>& to) {
    for (int64_t row = 0; row < x.m; ++row) RowRounding<V, T>(x, to, row).run();
}

template <class V>
void write_float(const Rows& x, const FloatInput& to) {
    for (int64_t row = 0; row < x.m; ++row)
        for (int64_t at = 0; at < x.k; at += kBlock) {
            float values[kBlock];
            V::widen(element(x, row, at), x.type, values,
                     static_cast<int>(x.k - at < kBlock ? x.k - at : kBlock));
            for (int j = 0; j < kBlock; ++j) to.values[(at + j) * to.panel + row] = values[j];
        }
}

}  // namespace
}  // namespace shallow
