// Activations as the kernels read them, in terms of the vector type V of w4_kernel.h.
#pragma once

#include <cmath>

#include "cpu/w4_matmul.h"

namespace shallow {
namespace {

using std::int64_t;
using std::int8_t;
using std::uint8_t;

// Else a call and its vectors by way of memory for each group, which may be one block.
#define SHALLOW_INLINE __attribute__((always_inline)) inline

constexpr float kTiny = 1e-30f;  // below this 127 / peak could overflow: taken as zero

inline const uint8_t* element(const Rows& x, int64_t row, int64_t column) {
    const int64_t size = x.type == ScaleType::float32 ? 4 : 2;
    return static_cast<const uint8_t*>(x.data) + (row * x.stride + column) * size;
}

// Rounds one row of x to int8, and where asked to what that leaves of the blocks whose step is not
// below the RMS of all: a sixth of the blocks of a trained model's norms, with most of the error.
template <class V>
struct RowRounding {
    const Rows& x;
    const TileView& w;
    int64_t row, panel, plane;  // the last two as in Int8Input
    bool fine;
    int8_t* q;  // of the row's first block, as are the scales and sums
    float *scales, *sums;

    void run() const {
        const int64_t groups =
            w.group_blocks ? w4::ceil_div(w.blocks, w.group_blocks) : 2 * w.blocks;
        for (int64_t g = 0; g < groups; ++g) sums[g * panel] = 0;
        float squares = 0;
        each_block([&](int64_t b, float* sum) {
            alignas(64) float values[kBlock];
            load(b, values);
            const float scale = round(values, b * panel, sum);
            squares += scale * scale;
        });
        const float limit = fine ? squares / static_cast<float>(w.blocks) : INFINITY;
        each_block([&](int64_t b, float* sum) {
            const int64_t at = b * panel;
            scales[plane + at] = 0;
            if (scales[at] * scales[at] < limit) return;
            alignas(64) float values[kBlock];
            load(b, values);
            for (int j = 0; j < kBlock; ++j) values[j] -= scales[at] * q[at * kBlock + j];
            round(values, plane + at, sum);
        });
    }
    // call(block, its first group's sum)
    template <class Call>
    SHALLOW_INLINE void each_block(const Call& call) const {
        float* sum = sums;
        for (int64_t b = 0, left = w.group_blocks; b < w.blocks; ++b) {
            call(b, sum);
            if (w.group_blocks == 0) sum += 2 * panel;
            if (--left == 0) sum += panel, left = w.group_blocks;
        }
    }
    SHALLOW_INLINE void load(int64_t b, float* values) const {
        const int64_t left = x.k - b * kBlock;
        V::widen(element(x, row, b * kBlock), x.type, values,
                 static_cast<int>(left < kBlock ? left : kBlock));
    }
    SHALLOW_INLINE float round(const float* values, int64_t at, float* sum) const {
        std::int32_t halves[2];
        const float scale = V::quantise(values, q + at * kBlock, halves);
        scales[at] = scale;
        if (w.group_blocks) {
            *sum += scale * static_cast<float>(halves[0] + halves[1]);
        } else {
            sum[0] += scale * static_cast<float>(halves[0]);
            sum[panel] += scale * static_cast<float>(halves[1]);
        }
        return scale;
    }
};

template <class V>
void quantise(const Rows& x, const TileView& w, const Int8Input& to, int64_t panel) {
    const int64_t begin = panel * kPanelRows, blocks = panel * w.blocks * to.panel;
    for (int64_t i = 0; i < to.panel && begin + i < x.m; ++i)
        RowRounding<V>{x, w, begin + i, to.panel, to.plane, to.fine,
                       to.q + (blocks + i) * kBlock, to.scales + blocks + i,
                       to.sums + panel * w.groups * to.panel + i}
            .run();
}

template <class V>
void widen(const Rows& x, const TileView& w, const FloatInput& to, int64_t panel) {
    const int64_t begin = panel * kPanelRows;
    float* const out = to.values + panel * w.blocks * kBlock * to.panel;
    for (int64_t i = 0; i < to.panel && begin + i < x.m; ++i)
        for (int64_t b = 0; b < w.blocks; ++b) {
            const int64_t count = x.k - b * kBlock < kBlock ? x.k - b * kBlock : kBlock;
            float values[kBlock];
            V::widen(element(x, begin + i, b * kBlock), x.type, values, static_cast<int>(count));
            for (int j = 0; j < kBlock; ++j) out[(b * kBlock + j) * to.panel + i] = values[j];
        }
}

}  // namespace
}  // namespace shallow
