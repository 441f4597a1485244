// How rows of x meet tiles, a panel at a time and of it as many rows as a kernel takes at once, in terms
// of the vector type V of w4_kernel.h.
#pragma once

#include "cpu/w4_stream.h"

namespace shallow {
namespace {

template <class V, int R>
inline void write_rows(const typename V::F (&total)[kParts<V>][R], const Output& y,
                       const Place& at) {
    alignas(64) float sums[R * kTileRows];
#pragma GCC unroll 2
    for (int p = 0; p < kParts<V>; ++p)
#pragma GCC unroll 16
        for (int i = 0; i < R; ++i) V::store_all(sums + i * kTileRows + p * V::lanes, total[p][i]);
    write<V>(sums, R, y, at);
}

// Calls run.template rows<R>() until `rows` are covered: R = 16, then what is left of 8 at once. Where
// codes pass by, all steps of R rows in one call.
template <int R, class Run>
inline void in_steps(int64_t first, int64_t rows, const Run& run) {
    if constexpr (Run::template passing<R>) {
        const int64_t steps = (rows - first) / R;
        if (steps > 0) run.template rows<R>(first, steps);
        first += steps * R;
    } else {
        for (; rows - first >= R; first += R) run.template rows<R>(first);
    }
    if constexpr (R > 8)
        in_steps<R / 2>(first, rows, run);
    else if constexpr (R > 1)
        in_steps<R - 1>(first, rows, run);
}

inline Place place_of(const TileView& w, int64_t tile) {
    Place at{};
    at.tile = tile;
    at.column = tile * kTileRows;
    at.n = w.n;
    return at;
}

// All rows of x meet the tile, or the tiles, at this place.
template <class Run, class Input>
void panels(const TileView& w, const Input& x, const Output& y, Place at) {
    for (int64_t left = x.m; left > 0; ++at.panel, left -= kPanelRows)
        in_steps<Run::most>(0, left < kPanelRows ? left : kPanelRows, Run{w, x, y, at});
}

}  // namespace
}  // namespace shallow
