// Several rows of int8 times one tile where 16 registers hold a block's sums and no more (AVX2): codes
// pass by a chunk at a time, and what is summed over blocks waits in memory, which each block reads
// and writes once.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cpu/w4_stream.h"

namespace shallow {
namespace {

// The parameters of a tile's groups: 16 scales, then 16 minimums, of each. Read by type and scheme
// beside every block they took a third of its time (benchmarks/results/decoder.md).
template <class V, Codes C>
void widen_params(const TileView& w, int64_t tile, float* out) {
    Stream<V, C> stream(w, tile);
    for (int64_t group = 0; group < w.groups; ++group, out += 2 * kTileRows) {
        typename V::F scale[kParts<V>], min[kParts<V>];
        stream.next8(scale, min);
        for (int p = 0; p < kParts<V>; ++p) {
            V::store_all(out + p * V::lanes, scale[p]);
            V::store_all(out + kTileRows + p * V::lanes, min[p]);
        }
        if (w.group_blocks || group % 2)
            stream.at += kBlockBytes<C> * std::max<int64_t>(w.group_blocks, 1);
    }
}

// Where the parts of a block lie that some rows of x meet.
struct Meeting {
    const uint8_t* block;
    const int8_t* q;
    const float *scales, *sums, *params;
    int64_t panel;
};

// Adds half-blocks First..Last-1, all that a group has of the block, for N rows, and before it the
// minimums of the groups that begin here. total: (N, 16).
template <class V, Codes C, int First, int Last, int N, int Begin>
SHALLOW_INLINE void meet(const TileView& w, const Meeting& at, float* total) {
    // Or the compiler reads the sums before the products, and has no registers to hold them in.
    const auto wait = [&] { asm volatile("" : : "r"(total) : "memory"); };
    const auto param = [&](int which, int p) {
        return V::load(at.params + which * kTileRows + p * V::lanes, ScaleType::float32);
    };
    typename V::F dots[kParts<V>][N];
    V::template dots<C, First, Last>(w, at.block, at.q + 16 * First, dots);
    wait();
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
        const auto scale = V::set(at.scales[i]);
        typename V::F sums[Begin + 1];
        for (int group = 0; group < Begin; ++group)
            sums[group] = V::set(at.sums[group * at.panel + i]);
#pragma GCC unroll 2
        for (int p = 0; p < kParts<V>; ++p) {
            float* const sum = total + i * kTileRows + p * V::lanes;
            auto value = V::load(sum, ScaleType::float32);
            for (int group = 0; group < Begin; ++group)
                value = V::fma(param(2 * group + 1, p), sums[group], value);
            value = V::fma(dots[p][i], V::mul(param(0, p), scale), value);
            V::store_all(sum, value);
        }
    }
    wait();
}

// The second plane of R rows. Where two have one all are taken together, those without by a scale of
// zero: alone one takes three quarters of the time of four.
template <class V, Codes C, int First, int Last, int R>
SHALLOW_INLINE void meet_second(const TileView& w, Meeting at, int64_t plane, float* total) {
    at.scales += plane;
    int fine = 0, last = 0;
    for (int i = 0; i < R; ++i)
        if (at.scales[i] > 0) ++fine, last = i;
    if (fine == 0) return;  // NaN alone
    at.q += plane * kBlock;
    if (fine > 1) return meet<V, C, First, Last, R, 0>(w, at, total);
    at.q += last * kBlock;
    at.scales += last;
    meet<V, C, First, Last, 1, 0>(w, at, total + last * kTileRows);
}

// Out of line for halves of blocks of nibbles, whose products else take a third longer; in line for the
// others, which are 5-12 % faster by that.
template <class V, Codes C, int First, int R>
__attribute__((noinline)) void meet_second_of_half(const TileView& w, Meeting at, int64_t plane,
                                                   float* total) {
    meet_second<V, C, First, First + 1, R>(w, at, plane, total);
}

template <class V, Codes C, int First, int Last, int R, int Begin>
SHALLOW_INLINE void meet_planes(const TileView& w, const Meeting& at, int64_t plane, float* total) {
    meet<V, C, First, Last, R, Begin>(w, at, total);
    if (all_zero<R>(at.scales + plane)) return;
    if constexpr (Last - First == 1 && C == Codes::nibble)
        meet_second_of_half<V, C, First, R>(w, at, plane, total);
    else
        meet_second<V, C, First, Last, R>(w, at, plane, total);
}

// Steps of R rows: all meet a block before the next, whose parameters and addresses they share. Rows
// that met the tile one step after the other took 7 % longer. Split: group 16, two groups a block.
template <class V, Codes C, int R, bool Split>
void passing_rows(const TileView& w, const Int8Input& x, const Output& y, const Place& at,
                  int64_t steps) {
    alignas(64) float total[kPanelRows * kTileRows];
    const int rows = static_cast<int>(steps) * R;
    std::fill_n(total, rows * kTileRows, 0.0f);
    const int64_t panel = x.panel, plane = x.plane, first = at.panel * w.blocks * panel + at.first;
    fetch(y, at, rows);
    const bool fetches = at.panel == 0 && at.first == 0;  // else others have
    Meeting here{w.data + at.tile * w.tile_bytes,
                 x.q + first * kBlock,
                 x.scales + first,
                 x.sums + at.panel * w.groups * panel + at.first,
                 at.params,
                 panel};
    // What a codebook has for a block is looked up once for all rows, a tenth less for 512.
    constexpr bool kLooksUp = C == Codes::nibble_table;
    constexpr Codes kMet = kLooksUp ? Codes::byte : C;
    alignas(64) uint8_t bytes[kLooksUp ? kBlockBytes<kMet> : 64];
    const auto add = [&](auto begins) {
        constexpr int kBegin = begins();
        if (fetches)
#pragma GCC unroll 8
            for (int line = 0; line < kBlockBytes<C>; line += 64)
                __builtin_prefetch(here.block + at.ahead + line, 0, 3);
        Meeting step = here;
        if constexpr (kLooksUp) {
            V::look_up(w, here.block, bytes);
            step.block = bytes;
        }
        for (float* sums = total; sums < total + rows * kTileRows; sums += R * kTileRows) {
            meet_planes<V, kMet, 0, Split ? 1 : 2, R, kBegin>(w, step, plane, sums);
            if constexpr (Split) {
                Meeting half = step;
                half.params += 2 * kTileRows;
                meet_planes<V, kMet, 1, 2, R, 0>(w, half, plane, sums);
            }
            step.q += R * kBlock;
            step.scales += R;
            step.sums += R;
        }
        here.block += kBlockBytes<C>;
        here.q += panel * kBlock;
        here.scales += panel;
    };
    int64_t groups = 0;  // left of a run
    for (int64_t b = 0, end; b < w.blocks;) {
        if (groups == 0) {
            here.block += w.head_bytes;
            groups = w.run_groups;
        }
        groups -= 1 + Split;
        end = Split ? b + 1 : std::min(b + w.group_blocks, w.blocks);
        add(std::integral_constant<int, 1 + Split>());
        while (++b < end) add(std::integral_constant<int, 0>());
        here.sums += (1 + Split) * panel;
        here.params += (1 + Split) * 2 * kTileRows;
    }
    write<V>(total, rows, y, at);
}

}  // namespace
}  // namespace shallow
