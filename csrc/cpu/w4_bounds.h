// What no product of some rows of x with a tile of bytes exceeds, by the high seven bits of each code, in
// terms of the vector type V of w4_kernel.h: x is rounded so that such products of a block are summed in
// 16 bits, where those of the whole code need x in 16 bits and sums of 32.
//
// A code is 2 h + l, l of 0 or 1, and stands for scale * (2 h + l - 128). Where x is X + e, X rounded to
// int8, the sum of a group over the scale is no more than that of 2 h X, which is multiplied here, and
//     -128 X + max(0, X) + 128 |e|,
// which write_bounds() sums over the group, and with it what rounding may add: that of x to 16 bits, of
// which the product is, and that of both sums.
#pragma once

#include <cmath>

#include "cpu/w4_panels.h"
#include "cpu/w4_passing.h"

namespace shallow {
namespace {

// Of |X| for each block of a row: two float32 sums, of less than 400 |x| in all, to which a block adds
// twice: 4 * 400 / 2^24.
constexpr float kOfSums = 1.0f / 8192;
constexpr float kOfLeft = 129;  // 128, and the same of |e|
// 32 columns of 128 times half a step of 16 bits, in steps of 8: 128 * 16 * 127 / 32767.
constexpr float kOfWords = 8;

// What the largest of a block is rounded to: at most 127, and so small that 127 times all that is
// positive, or negative, in the 16 columns under one sum of 16 bits is no more than 258 * 127, of which
// rounding may add 8. These columns are the first, or the last, two of each four.
float most_of(const float* values) {
    float of_sign[2][4] = {}, peak = 0;
    for (int j = 0; j < kBlock; j += 4)
        for (int i = 0; i < 4; ++i) {
            const float value = values[j + i], size = std::abs(value);
            of_sign[0][i] += size + value;
            of_sign[1][i] += size - value;
            peak = std::max(peak, size);
        }
    float twice = 0;
    for (const auto& sums : of_sign)
        for (int i = 0; i < 4; i += 2) twice = std::max(twice, sums[i] + sums[i + 1]);
    const float most = peak / twice * 500;
    return most < 127 ? most : 127;  // of zeros, or what is not finite
}

template <class V>
void write_bounds(const Rows& x, const Int8Input& to) {
    for (int64_t row = 0; row < x.m; ++row) {
        const RowRounding<V, int8_t> one(x, to, row);
        const float of_sums = kOfSums * static_cast<float>(one.blocks + 4);
        one.clear_sums();
        one.each_block([&](int64_t b, float* sum) {
            alignas(64) float values[kBlock];
            one.load(b, values);
            const int64_t at = b * to.panel;
            const int8_t* const q = one.q + at * kBlock;
            std::int32_t halves[2];
            const float scale = V::quantize(values, one.q + at * kBlock, halves, most_of(values));
            float size = 0, left = 0;
            for (int j = 0; j < kBlock; ++j) {
                const float rounded = scale * static_cast<float>(q[j]);
                size += std::abs(rounded);
                left += std::abs(values[j] - rounded);
            }
            one.scales[at] = scale;
            *sum += scale * (-127.5f * static_cast<float>(halves[0] + halves[1]) + kOfWords) +
                    (0.5f + of_sums) * size + kOfLeft * left;
        });
    }
}

template <class V>
struct BoundRun {
    static constexpr int most = V::template most_rows<Codes::high>;
    template <int R>
    static constexpr bool passing = true;

    const TileView& w;
    const Int8Input& x;
    const Output& tops;
    Place at;
    template <int R>
    void rows(int64_t first, int64_t steps) const {
        Place here = at;
        here.first = first;
        passing_rows<V, Codes::high, R, false, false>(w, x, tops, here, steps);
    }
};

template <class V>
void bound_tiles(const TileView& w, const Int8Input& x, const Output& tops, int64_t begin,
                 int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
        Place at = place_of(w, tile);
        at.twice = fetches_twice(false, x.m);
        panels<BoundRun<V>>(w, x, tops, at);
    }
}

}  // namespace
}  // namespace shallow
