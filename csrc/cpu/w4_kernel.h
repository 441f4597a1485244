// The matmul of 4, 6 and 8 bits for one instruction set, in terms of its vector type V.
// Everything is local to the including file: an inline function shared by files compiled for
// different instruction sets could be linked into the wrong one.
//
// V names its vector F of V::lanes floats (16, 8 or 4 rows of a tile), V::max_rows rows of x that meet
// a block at once (V::most_rows<C> of int8), whether it gains from unpacked tiles (V::unpacks),
// whether its registers hold a block's codes (V::keeps_codes), whether it has products of 16 bits
// (V::words), whether a lone row keeps what a K-quant's groups have in common (V::keeps_supers) and,
// where codes pass by, meets them with both its planes at once (V::joins_planes<C>), and the functions
// used below.
#pragma once

#include "cpu/features.h"
#include "cpu/w4_bounds.h"
#include "cpu/w4_float.h"
#include "cpu/w4_passing.h"

namespace shallow {
namespace {

// One block of rows of x.
template <class T>
struct Planes {
    const T* q;
    const float* scales;
    int64_t plane;
};

// Adds the products of half-blocks First..Last-1 of a block with R rows of x: their codes stay in
// registers, and rows meet them one by one.
template <class V, Codes C, int R, int First, int Last>
SHALLOW_INLINE void add_to_codes(const TileView& w, const uint8_t* block, const Planes<int8_t>& x,
                                 typename V::F scale, typename V::F (&total)[R]) {
    const auto codes = V::template codes<C, First, Last, R>(w, block);
    const auto add = [&](int i, const int8_t* q, const float* scales) {
        const typename V::F dot = V::dot(codes, q + i * kBlock + 16 * First);
        total[i] = V::fma(dot, V::mul(scale, V::set(scales[i])), total[i]);
    };
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) add(i, x.q, x.scales);
    const float* const scales = x.scales + x.plane;
    if constexpr (R > 1)
        if (all_zero<R>(scales)) return;
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
        if (scales[i] > 0) add(i, x.q + x.plane * kBlock, scales);
}

// The same for one row, all parts of the tile, where 16 registers hold sums and codes pass by.
template <class V, Codes C, int First, int Last, class T>
SHALLOW_INLINE void add_to_sums(const TileView& w, const uint8_t* block, const Planes<T>& x,
                                const typename V::F (&scale)[kParts<V>],
                                typename V::F (&total)[kParts<V>][1]) {
    const auto add = [&](int plane, auto planes) __attribute__((always_inline)) {
        constexpr int kPlanes = planes();
        typename V::F dots[kParts<V>][kPlanes];
        const T* const q = x.q + plane * x.plane * kBlock + 16 * First;
        V::template dots<C, First, Last>(w, block, q, dots, x.plane * kBlock);
        for (int i = 0; i < kPlanes; ++i)
            for (int p = 0; p < kParts<V>; ++p) {
                const auto x_scale = V::set(x.scales[(plane + i) * x.plane]);
                total[p][0] = V::fma(dots[p][i], V::mul(scale[p], x_scale), total[p][0]);
            }
    };
    using One = std::integral_constant<int, 1>;
    if constexpr (sizeof(T) != 1) return add(0, One());
    const bool second = x.scales[x.plane] > 0;
    if constexpr (V::template joins_planes<C>) {
        if (second) return add(0, std::integral_constant<int, 2>());
        return add(0, One());
    }
    add(0, One());
    if (second) add(1, One());
}

// The products with R rows of x of the tile that lies `by` behind a stream's, block by block. Split: group
// 16, two groups a block. Tiles that have one stream share its counts and addresses: of a stream each
// they took a sixth more instructions, and GCC kept addresses in vectors.
template <class V, Codes C, int R, bool Split, Params P>
struct TileSums {
    using F = typename V::F;

    static constexpr bool kKeeps = R == 1 && P == Params::kquant && V::keeps_supers;

    Behind by;
    F total[kParts<V>][R], scale[1 + Split][kParts<V>];
    std::conditional_t<kKeeps, Kept<V>, char> kept{};

    TileSums() = default;
    SHALLOW_INLINE explicit TileSums(Behind by) : by(by) {
        for (auto& part : total)
            for (F& sum : part) sum = V::set(0.0f);
    }
    // sums: of rows of x over the group, times what a minimum is of its scale where all are alike.
    SHALLOW_INLINE void enter_group(const Stream<V, C>& stream, int half, const F (&sums)[R]) {
        F min[kParts<V>];
        if constexpr (kKeeps)
            stream.params_kept(kept, scale[half], min, by);
        else
            stream.template params8<P>(scale[half], min, by);
        const auto& by_sums = minimum_of_scale<P> ? scale[half] : min;
        for (int p = 0; p < kParts<V>; ++p)
#pragma GCC unroll 16
            for (int i = 0; i < R; ++i) total[p][i] = V::fma(by_sums[p], sums[i], total[p][i]);
    }
    template <class T>
    SHALLOW_INLINE void add(const TileView& w, const uint8_t* block, const Place& at,
                            const Planes<T>& x) {
        block += by.bytes;
        if constexpr (C != Codes::unpacked) fetch_codes<C>(block, at.ahead, at.twice);
        if constexpr (Split) {
            add_half<0, 1>(w, block, x, scale[0]);
            add_half<1, 2>(w, block, x, scale[1]);
        } else {
            add_half<0, 2>(w, block, x, scale[0]);
        }
    }
    template <int First, int Last, class T>
    SHALLOW_INLINE void add_half(const TileView& w, const uint8_t* block, const Planes<T>& x,
                                 const F (&steps)[kParts<V>]) {
        if constexpr (V::keeps_codes)
            for (int p = 0; p < kParts<V>; ++p)
                add_to_codes<V, C, R, First, Last>(w, block + p * V::lanes * 4, x, steps[p],
                                                   total[p]);
        else
            add_to_sums<V, C, First, Last>(w, block, x, steps, total);
    }
};

constexpr int kMostStreams = 4;
constexpr int64_t kInTurn = 4;  // blocks

// The most rows of x that tiles in turn meet: where codes pass by (AVX2) two do not wait for memory.
template <class V>
constexpr int64_t kInStreams = V::keeps_codes ? kStreamedRows : 1;

// Where the blocks of rows of x begin that tiles meet next.
template <class T>
struct RowBlocks {
    const T* q;
    const float *scales, *sums;
};

// One tile, or two or four in turn, which memory then reads as so many streams: by one row a matrix of
// an 8B model took 73-90 % of the bandwidth of a plain read by two, 67-78 % by one; from L3 both take
// 94 % (benchmarks/results/decoder.md).
template <class V, Codes C, int R, bool Split, Params P = Params::any, class T>
void int_rows(const TileView& w, const IntInput<T>& x, const Output& y, const Place& at) {
    using Tile = TileSums<V, C, R, Split, P>;
    using F = typename V::F;
    // Minus a power of two, so that to multiply x by it and not every scale changes no bit.
    const float of_scale = !minimum_of_scale<P>       ? 1.0f
                           : C == Codes::nibble_table ? -128.0f
                                                      : -w.center;
    RowBlocks<T> next{x.q + (at.panel * w.blocks * x.panel + at.first) * kBlock,
                      x.scales + at.panel * w.blocks * x.panel + at.first,
                      x.sums + at.panel * w.groups * x.panel + at.first};
    const auto tile = [&](int i) __attribute__((always_inline)) {
        return Tile(Behind{i * at.apart, i * at.apart * w.tile_bytes});
    };
    // The next blocks of tiles that take turns block by block.
    const auto meet = [&](Stream<V, C>& stream, int64_t blocks,
                          auto&... tiles) __attribute__((always_inline)) {
        for (int64_t b = 0, left = 0; b < blocks; ++b) {
            if (left-- == 0) {
                for (int half = 0; half < 1 + Split; ++half, next.sums += x.panel) {
                    if (stream.enter()) (stream.fetch_head(tiles.by), ...);
                    F sums[R];
#pragma GCC unroll 16
                    for (int i = 0; i < R; ++i) sums[i] = V::set(next.sums[i] * of_scale);
                    (tiles.enter_group(stream, half, sums), ...);
                }
                left = Split ? 0 : w.group_blocks - 1;
            }
            const uint8_t* const block = stream.block();
            (tiles.add(w, block, at, Planes<T>{next.q, next.scales, x.plane}), ...);
            next.q += x.panel * kBlock;
            next.scales += x.panel;
        }
    };
    // In line: of a function that is called twice GCC keeps tiles and sums in memory.
    const auto walk = [&](auto... tiles) __attribute__((always_inline)) {
        Stream<V, C> stream(w, at.tile, 0, at.ahead);
        meet(stream, w.blocks, tiles...);
        int i = 0;
        (write_rows<V, R>(tiles.total, y, at.of_stream(i++)), ...);
    };
    if constexpr (R == 1 && C != Codes::unpacked) {
        if (at.streams == 4) return walk(tile(0), tile(1), tile(2), tile(3));
        if (at.streams == 2) return walk(tile(0), tile(1));
    }
    if constexpr (R > 1) fetch(y, at, R);
    // Block by block the sums of several rows would not stay in registers: four blocks a turn, or a group.
    if constexpr (R > 1 && R <= kInStreams<V> && C != Codes::unpacked)
        if (at.streams > 1) {
            Tile tiles[kMostStreams];
            for (int i = 0; i < at.streams; ++i) tiles[i] = tile(i);
            const int64_t turn = std::max(kInTurn, w.group_blocks);
            for (int64_t b = 0; b < w.blocks; b += turn) {
                const RowBlocks<T> here = next;
                const Stream<V, C> start(w, at.tile, b, at.ahead);
                for (int i = 0; i < at.streams; ++i) {
                    Stream<V, C> stream = start;
                    next = here;
                    Tile one = tiles[i];
                    meet(stream, std::min(turn, w.blocks - b), one);
                    tiles[i] = one;
                }
            }
            for (int i = 0; i < at.streams; ++i)
                write_rows<V, R>(tiles[i].total, y, at.of_stream(i));
            return;
        }
    walk(tile(0));
}

template <class V, Codes C, class T>
struct IntRun {
    static constexpr int most = V::template most_rows<C>;
    template <int R>
    static constexpr bool passing = R > 1 && !V::keeps_codes;

    const TileView& w;
    const IntInput<T>& x;
    const Output& y;
    Place at;
    template <int R>
    void rows(int64_t first, int64_t steps = 1) const {
        Place here = at;
        here.first = first;
        for (int64_t i = 0; i < at.together; ++i) {
            here.tile = at.tile + i;
            here.column = at.column + i * kTileRows;
            meet<R>(here, steps);
        }
    }
    template <int R>
    SHALLOW_INLINE void meet(const Place& here, int64_t steps) const {
        if (w.group_blocks)
            meet<R, false>(here, steps);
        else
            meet<R, true>(here, steps);
    }
    template <int R, bool Split>
    SHALLOW_INLINE void meet(const Place& here, int64_t steps) const {
        if constexpr (passing<R>) {
            constexpr bool kBytes = C == Codes::nibble && !Split;
            if (kBytes && steps > 1 && unpacks_nibbles())
                passing_rows<V, C, R, Split, kBytes>(w, x, y, here, steps);
            else
                passing_rows<V, C, R, Split, false>(w, x, y, here, steps);
        } else if constexpr (R == 1 && C != Codes::unpacked) {
            by_params<C, Split>(params_of(w), [&](auto params) {
                int_rows<V, C, R, Split, params()>(w, x, y, here);
            });
        } else {
            int_rows<V, C, R, Split>(w, x, y, here);
        }
    }
};

// Writes one tile as an unpacked matrix of its own.
template <class V, Codes C>
TileView unpack_tile(const TileView& w, int64_t tile, uint8_t* scratch) {
    TileView one = w;
    one.data = scratch;
    one.kind = Codes::unpacked;
    one.block_bytes = kBlock * kTileRows;
    one.record_bytes = 2 * kTileRows * static_cast<int64_t>(sizeof(float));
    one.tiles = 1;
    one.set_runs();

    Stream<V, C> stream(w, tile);
    for (int64_t b = 0; b < w.blocks; ++b) {
        const int64_t group = w.group_blocks ? b / w.group_blocks : 2 * b;
        if (!w.group_blocks || b % w.group_blocks == 0)
            for (int half = 0; half < (w.group_blocks ? 1 : 2); ++half) {
                typename V::F scale[kParts<V>], min[kParts<V>];
                stream.next8(scale, min);
                auto* const out =
                    reinterpret_cast<float*>(const_cast<uint8_t*>(one.record(0, group + half)));
                for (int p = 0; p < kParts<V>; ++p) {
                    V::store_all(out + p * V::lanes, scale[p]);
                    V::store_all(out + kTileRows + p * V::lanes, min[p]);
                }
            }
        V::template unpack<C>(w, stream.block(), const_cast<uint8_t*>(one.block(0, b)));
    }
    return one;
}

template <class V, Codes C, class T>
void int_tiles_of(const TileView& w, const IntInput<T>& x, const Output& y, int64_t begin,
                  int64_t end, uint8_t* scratch) {
    const bool is_long = (end - begin) / 2 * w.tile_bytes >= kLong;
    const bool twice = fetches_twice(V::keeps_codes, x.m);
    if (x.m == 1 || (is_long && x.m <= kInStreams<V>)) {
        for (int streams = is_long ? long_streams(x.m) : 2; streams > 1; streams /= 2) {
            const int64_t each = (end - begin) / streams;
            for (int64_t tile = begin; tile < begin + each; ++tile) {
                Place at = place_of(w, tile);
                at.streams = streams;
                at.apart = each;
                at.ahead = is_long && (V::keeps_codes || twice) ? bytes_ahead(twice) : kAhead;
                at.twice = twice;
                panels<IntRun<V, C, T>>(w, x, y, at);
            }
            begin += streams * each;
        }
    }
    const int64_t most = V::unpacks || x.m < kManyRows ? 1 : tiles_together(w);
    for (int64_t tile = begin, some; tile < end; tile += some) {
        some = std::min(most, end - tile);
        Place at = place_of(w, tile);
        at.together = some;
        at.twice = twice;
        if constexpr (V::unpacks) {
            if (x.m >= kManyRows) {
                at.tile = 0;
                const TileView one = unpack_tile<V, C>(w, tile, scratch);
                panels<IntRun<V, Codes::unpacked, T>>(one, x, y, at);
                continue;
            }
        }
        panels<IntRun<V, C, T>>(w, x, y, at);
    }
}

// Bytes, and codebooks of them.
template <class V, class T>
void byte_tiles(const TileView& w, const IntInput<T>& x, const Output& y, int64_t begin,
                int64_t end, uint8_t* scratch) {
    if (w.kind == Codes::byte)
        int_tiles_of<V, Codes::byte>(w, x, y, begin, end, scratch);
    else
        int_tiles_of<V, Codes::nibble_table>(w, x, y, begin, end, scratch);
}

template <class V>
void int8_tiles(const TileView& w, const Int8Input& x, const Output& y, int64_t begin, int64_t end,
                uint8_t* scratch) {
    if (w.kind == Codes::six)
        int_tiles_of<V, Codes::six>(w, x, y, begin, end, scratch);
    else if (V::words || w.kind == Codes::nibble)
        int_tiles_of<V, Codes::nibble>(w, x, y, begin, end, scratch);
    else if constexpr (!V::words)
        byte_tiles<V>(w, x, y, begin, end, scratch);
}

template <class V>
constexpr Kernels make_kernels() {
    Kernels kernels{};
    kernels.write_int8 = write_int<V, int8_t>;
    kernels.write_float = write_float<V>;
    kernels.int8_tiles = int8_tiles<V>;
    kernels.float_tiles = float_tiles<V>;
    if constexpr (V::words) {
        kernels.write_int16 = write_int<V, int16_t>;
        kernels.int16_tiles = byte_tiles<V, int16_t>;
        kernels.write_bounds = write_bounds<V>;
        kernels.bound_tiles = bound_tiles<V>;
    }
    return kernels;
}

}  // namespace
}  // namespace shallow
