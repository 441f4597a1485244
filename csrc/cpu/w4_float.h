// The matmul with x in float32, of codes and of plain weights, in terms of the vector type V of
// w4_kernel.h.
#pragma once

#include "cpu/w4_panels.h"

namespace shallow {
namespace {

// One weight vector a column, in float32, times R rows of x.
template <class V, Codes C, int R, bool Split>
void float_rows(const TileView& w, const FloatInput& x, const Output& y, const Place& at) {
    using F = typename V::F;
    const float* values = x.values + at.panel * w.blocks * kBlock * x.panel + at.first;
    Stream<V, C> stream(w, at.tile);
    F total[kParts<V>][R], scale[1 + Split][kParts<V>], min[1 + Split][kParts<V>];
    for (auto& part : total)
        for (F& sum : part) sum = V::set(0.0f);

    for (int64_t b = 0, left = 0; b < w.blocks; ++b) {
        if (left-- == 0) {
            for (int s = 0; s < 1 + Split; ++s) stream.next(scale[s], min[s]);
            left = Split ? 0 : w.group_blocks - 1;
        }
        const uint8_t* const block = stream.block();
        for (int k = 0; k < kBlock; k += 4) {
            const int s = Split ? k / 16 : 0;
            for (int p = 0; p < kParts<V>; ++p) {
                const auto chunk = V::template chunk<C>(block + p * V::lanes * 4, k / 4);
                for (int byte = 0; byte < 4; ++byte) {
                    const F code = V::template code<C>(w, chunk, byte);
                    const F weight = V::fma(code, scale[s][p], min[s][p]);
                    for (int i = 0; i < R; ++i)
                        total[p][i] =
                            V::fma(weight, V::set(values[(k + byte) * x.panel + i]), total[p][i]);
                }
            }
        }
        values += x.panel * kBlock;
    }
    write_rows<V, R>(total, y, at);
}

// Plain weights, two columns at a time: no codes, no parameters.
template <class V, Codes C, int R>
void plain_rows(const TileView& w, const FloatInput& x, const Output& y, const Place& at) {
    using F = typename V::F;
    constexpr ScaleType kType = C == Codes::float32 ? ScaleType::float32 : ScaleType::float16;
    constexpr int64_t kBytes = C == Codes::float32 ? 4 : 2;
    const uint8_t* weights = w.block(at.tile, 0);
    const float* values = x.values + at.panel * w.blocks * kBlock * x.panel + at.first;
    F total[kParts<V>][R];
    for (auto& part : total)
        for (F& sum : part) sum = V::set(0.0f);
    for (int64_t k = 0; k < w.blocks * kBlock; k += 2) {
        if constexpr (R <= 4) __builtin_prefetch(weights + kAheadOfPlain, 0, 2);
        for (int p = 0; p < kParts<V>; ++p) {
            F even, odd;
            if constexpr (C == Codes::bfloat16) {
                V::load_pairs(weights + p * V::lanes * 4, even, odd);
            } else {
                even = V::load(weights + p * V::lanes * kBytes, kType);
                odd = V::load(weights + (kTileRows + p * V::lanes) * kBytes, kType);
            }
#pragma GCC unroll 16
            for (int i = 0; i < R; ++i) {
                total[p][i] = V::fma(even, V::set(values[i]), total[p][i]);
                total[p][i] = V::fma(odd, V::set(values[x.panel + i]), total[p][i]);
            }
        }
        weights += 2 * kTileRows * kBytes;
        values += 2 * x.panel;
    }
    write_rows<V, R>(total, y, at);
}

template <class V, Codes C>
struct FloatRun {
    static constexpr int most = V::max_rows;
    template <int R>
    static constexpr bool passing = false;

    const TileView& w;
    const FloatInput& x;
    const Output& y;
    Place at;
    template <int R>
    void rows(int64_t first) const {
        Place here = at;
        here.first = first;
        if constexpr (C == Codes::float32 || C == Codes::float16 || C == Codes::bfloat16)
            plain_rows<V, C, R>(w, x, y, here);
        else if (w.group_blocks)
            float_rows<V, C, R, false>(w, x, y, here);
        else
            float_rows<V, C, R, true>(w, x, y, here);
    }
};

template <class V, Codes C>
void float_tiles_of(const TileView& w, const FloatInput& x, const Output& y, int64_t begin,
                    int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile)
        panels<FloatRun<V, C>>(w, x, y, place_of(w, tile));
}

template <class V>
void float_tiles(const TileView& w, const FloatInput& x, const Output& y, int64_t begin,
                 int64_t end) {
    switch (w.kind) {
        case Codes::nibble: return float_tiles_of<V, Codes::nibble>(w, x, y, begin, end);
        case Codes::nibble_table:
            return float_tiles_of<V, Codes::nibble_table>(w, x, y, begin, end);
        case Codes::six: return float_tiles_of<V, Codes::six>(w, x, y, begin, end);
        case Codes::byte: return float_tiles_of<V, Codes::byte>(w, x, y, begin, end);
        case Codes::float32: return float_tiles_of<V, Codes::float32>(w, x, y, begin, end);
        case Codes::float16: return float_tiles_of<V, Codes::float16>(w, x, y, begin, end);
        default: return float_tiles_of<V, Codes::bfloat16>(w, x, y, begin, end);
    }
}

}  // namespace
}  // namespace shallow
