// Several rows of integers times one tile where 16 registers hold a block's sums and no more (AVX2):
// codes pass by a chunk at a time, and what is summed over blocks waits in memory, which each block
// reads and writes once.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cpu/w4_stream.h"

namespace shallow {
namespace {

// The parameters of the next group, as 16 scales, then 16 minimums. Read by type and scheme beside every
// block for every step of rows they took a third of its time (benchmarks/results/decoder.md).
template <class V, Codes C, bool Split>
SHALLOW_INLINE void widen_params(Params kind, Stream<V, C>& stream, float* out) {
    by_params<C, Split>(kind, [&](auto params) __attribute__((always_inline)) {
        typename V::F scale[kParts<V>], min[kParts<V>];
        stream.template next8<params()>(scale, min);
        for (int p = 0; p < kParts<V>; ++p) {
            V::store_all(out + p * V::lanes, scale[p]);
            V::store_all(out + kTileRows + p * V::lanes, min[p]);
        }
    });
}

// Where the parts of a block lie that some rows of x meet.
template <class T>
struct Meeting {
    const uint8_t* block;
    const T* q;
    const float *scales, *sums, *params;
    int64_t panel;
};

// Adds half-blocks First..Last-1, all that a group has of the block, for N rows, and before it the
// minimums of the groups that begin here. total: (N, 16).
template <class V, Codes C, int First, int Last, int N, int Begin, class T>
SHALLOW_INLINE void meet(const TileView& w, const Meeting<T>& at, float* total) {
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
SHALLOW_INLINE void meet_second(const TileView& w, Meeting<int8_t> at, int64_t plane,
                                float* total) {
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

template <class V, Codes C, int First, int Last, int R, int Begin, class T>
SHALLOW_INLINE void meet_planes(const TileView& w, const Meeting<T>& at, int64_t plane,
                                float* total) {
    meet<V, C, First, Last, R, Begin>(w, at, total);
    if constexpr (sizeof(T) == 1 && C != Codes::high) {
        if (all_zero<R>(at.scales + plane)) return;
        meet_second<V, C, First, Last, R>(w, at, plane, total);
    }
}

// Steps of R rows: all meet a block before the next, whose parameters and addresses they share. Rows
// that met the tile one step after the other took 7 % longer. Split: group 16, two groups a block.
// Bytes: nibbles become bytes for all steps.
template <class V, Codes C, int R, bool Split, bool Bytes, class T>
void passing_rows(const TileView& w, const IntInput<T>& x, const Output& y, const Place& at,
                  int64_t steps) {
    alignas(64) float total[kPanelRows * kTileRows];
    const int rows = static_cast<int>(steps) * R;
    std::fill_n(total, rows * kTileRows, 0.0f);
    const int64_t panel = x.panel, plane = x.plane, first = at.panel * w.blocks * panel + at.first;
    if constexpr (C != Codes::high) fetch(y, at, rows);
    const bool fetches = at.panel == 0 && at.first == 0;  // else others have
    const Params kind = params_of(w);
    Stream<V, C> stream(w, at.tile, 0, fetches ? at.ahead : 0);
    alignas(64) float params[(1 + Split) * 2 * kTileRows];
    Meeting<T> here{nullptr,          x.q + first * kBlock,
                    x.scales + first, x.sums + at.panel * w.groups * panel + at.first,
                    params,           panel};
    // Sixes, what codebooks have and halves of blocks are unpacked for one step too, halves in half the time.
    constexpr bool kUnpacks =
        C == Codes::nibble_table || C == Codes::six || (C == Codes::nibble && (Bytes || Split));
    constexpr Codes kMet = C == Codes::six ? Codes::unpacked : kUnpacks ? Codes::byte : C;
    alignas(64) uint8_t bytes[kUnpacks ? kBlockBytes<kMet> : 64];
    const auto add = [&](auto begins) {
        constexpr int kBegin = begins();
        here.block = stream.block();
        if (fetches) fetch_codes<C>(here.block, at.ahead, at.twice);
        Meeting<T> step = here;
        if constexpr (kUnpacks) {
            V::template unpack<C>(w, here.block, bytes);
            step.block = bytes;
        }
        for (float* sums = total; sums < total + rows * kTileRows; sums += R * kTileRows) {
            meet_planes<V, kMet, 0, Split ? 1 : 2, R, kBegin>(w, step, plane, sums);
            if constexpr (Split) {
                Meeting<T> half = step;
                half.params += 2 * kTileRows;
                meet_planes<V, kMet, 1, 2, R, 0>(w, half, plane, sums);
            }
            step.q += R * kBlock;
            step.scales += R;
            step.sums += R;
        }
        here.q += panel * kBlock;
        here.scales += panel;
    };
    for (int64_t b = 0, end; b < w.blocks;) {
        for (int group = 0; group < 1 + Split; ++group)
            widen_params<V, C, Split>(kind, stream, params + group * 2 * kTileRows);
        end = Split ? b + 1 : std::min(b + w.group_blocks, w.blocks);
        add(std::integral_constant<int, 1 + Split>());
        while (++b < end) add(std::integral_constant<int, 0>());
        here.sums += (1 + Split) * panel;
    }
    if constexpr (C == Codes::high)
        write_tops<V>(total, rows, y, at);
    else
        write<V>(total, rows, y, at);
}

}  // namespace
}  // namespace shallow
