// AVX-512 for a few rows of x; for many, weights are unpacked to bfloat16 and multiplied as tiles
// of 16 x 32 that add in float32: no scale is left to apply to the sums.
//
// A slice of two weight tiles is unpacked into the first-level cache, where all rows of x meet it;
// sums wait in memory. Out of L2 a tile product takes as long as one operand needs to arrive: a
// prefill of 512 tokens went from 1,869 to 3,570 tok/s (benchmarks/results/decoder.md).
#include "cpu/amx_tiles.h"
#include "cpu/w4_vector_avx512.h"

namespace shallow {
namespace {

// Blocks begin..end-1 of one tile as (blocks, 16 column pairs, 16 rows, 2) bfloat16.
template <Codes C, bool Split>
void unpack_codes(const TileView& w, int64_t tile, int64_t begin, int64_t end,
                  std::uint16_t* out) {
    const int64_t group_blocks = Split ? 1 : w.group_blocks;
    Stream<Avx512, C> stream(w, tile, begin);
    __m512 scale[2] = {}, min[2] = {};
    for (int64_t b = begin; b < end; ++b) {
        if (b == begin || b % group_blocks == 0)
            for (int s = 0; s < 1 + Split; ++s) stream.next(scale + s, min + s);
        const uint8_t* const block = stream.block();
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) {
            const __m512i chunk = Avx512::chunk<C>(block, j);
            const int s = Split ? j / 4 : 0;
            __m512 weights[4];
            for (int byte = 0; byte < 4; ++byte)
                weights[byte] =
                    _mm512_fmadd_ps(Avx512::code<C>(w, chunk, byte), scale[s], min[s]);
            _mm512_storeu_si512(out, pair(weights[0], weights[1]));
            _mm512_storeu_si512(out + 32, pair(weights[2], weights[3]));
            out += 64;
        }
    }
}

template <Codes C>
void unpack(const TileView& w, int64_t tile, int64_t begin, int64_t end, std::uint16_t* out) {
    if (w.group_blocks)
        unpack_codes<C, false>(w, tile, begin, end, out);
    else
        unpack_codes<C, true>(w, tile, begin, end, out);
}

void unpack_half(const TileView& w, int64_t tile, int64_t begin, int64_t end,
                 std::uint16_t* out) {
    const uint8_t* weights = w.block(tile, begin);
    for (int64_t k = begin * kBlock; k < end * kBlock; k += 2, weights += 64, out += 32)
        _mm512_storeu_si512(
            out, pair(Avx512::load_half(weights), Avx512::load_half(weights + 32)));
}

const std::uint16_t* bfloats(const TileView& w, int64_t tile, int64_t begin, int64_t end,
                             std::uint16_t* scratch) {
    switch (w.kind) {
        case Codes::bfloat16:
            return reinterpret_cast<const std::uint16_t*>(w.block(tile, begin));
        case Codes::float16: unpack_half(w, tile, begin, end, scratch); break;
        case Codes::byte: unpack<Codes::byte>(w, tile, begin, end, scratch); break;
        case Codes::nibble_table: unpack<Codes::nibble_table>(w, tile, begin, end, scratch); break;
        default: unpack<Codes::nibble>(w, tile, begin, end, scratch);
    }
    return scratch;
}

using Sums = float[2][2][kPanelRows * kTileRows];  // 2 panels x 2 tiles x (16 of x, 16 of W)

// Where a tile of sums is to lie.
struct Target {
    float* data;
    int64_t stride;  // bytes between rows
};

// `before`, if any, and the products of `blocks` blocks of two panels and two tiles.
void multiply(const std::uint16_t* const (&x)[2], const std::uint16_t* const (&w)[2],
              int64_t blocks, const Sums* before, const Target (&to)[2][2]) {
    for (int i = 0; i < 2; ++i) {
        sanitizer_reads(x[i], blocks * kTile * sizeof *x[i]);
        sanitizer_reads(w[i], blocks * kTile * sizeof *w[i]);
        for (const Target& target : to[i])
            for (int row = 0; row < kPanelRows; ++row)
                sanitizer_writes(target.data + row * target.stride / 4, 64);
    }
    if (before) {
        _tile_loadd(0, (*before)[0][0], 64);
        _tile_loadd(1, (*before)[0][1], 64);
        _tile_loadd(2, (*before)[1][0], 64);
        _tile_loadd(3, (*before)[1][1], 64);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t at = 0; at < blocks * kTile; at += kTile) {
        _tile_stream_loadd(4, x[0] + at, 64);
        _tile_loadd(6, w[0] + at, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, w[1] + at, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_stream_loadd(5, x[1] + at, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, to[0][0].data, to[0][0].stride);
    _tile_stored(1, to[0][1].data, to[0][1].stride);
    _tile_stored(2, to[1][0].data, to[1][0].stride);
    _tile_stored(3, to[1][1].data, to[1][1].stride);
}

// Two panels and two tiles of y, of which some may lie outside or need more than a store.
struct Corner {
    const TileView& w;
    const Output& y;
    int64_t panel, tile, m, tiles;

    // Sums of whole tiles go to y at once. Its lines are fetched while the tiles are multiplied: a
    // prefill is 4 % slower without (benchmarks/results/decoder.md).
    Target target(int p, int t, Sums& spare) const {
        const int64_t row = (panel + p) * kPanelRows, column = (tile + t) * kTileRows;
        if (!whole(p, t)) return {spare[p][t], 64};
        float* const data = static_cast<float*>(y.data) + row * y.stride + column;
        for (int i = 0; i < kPanelRows; ++i) __builtin_prefetch(data + i * y.stride, 1);
        return {data, y.stride * 4};
    }
    void finish(int p, int t, const Sums& spare) const {
        const int64_t left = m - (panel + p) * kPanelRows;
        if (whole(p, t) || left <= 0 || tile + t >= tiles) return;
        Place at{};
        at.tile = tile + t;
        at.panel = panel + p;
        at.column = (tile + t) * kTileRows;
        at.n = w.n;
        write<Avx512>(spare[p][t], static_cast<int>(left < kPanelRows ? left : kPanelRows), y, at);
    }

private:
    bool whole(int p, int t) const {
        return y.type == ScaleType::float32 && !y.bias && (panel + p + 1) * kPanelRows <= m &&
               tile + t < tiles && (tile + t + 1) * kTileRows <= w.n;
    }
};

void bfloat_tiles(const TileView& w, const BfloatInput& x, const Output& y, int64_t begin,
                  int64_t end, uint8_t* scratch) {
    const TileConfig config;
    _tile_loadconfig(&config);
    auto* const slice = reinterpret_cast<std::uint16_t*>(scratch);
    auto* const sums = reinterpret_cast<Sums*>(scratch + 2 * kSliceBlocks * kTile * 2);
    const int64_t panels = (x.m + kPanelRows - 1) / kPanelRows;
    const int64_t slices = (w.blocks + kSliceBlocks - 1) / kSliceBlocks;
    alignas(64) Sums spare;

    for (int64_t i = 0; i < slices; ++i) {
        const int64_t from = w.blocks * i / slices, to = w.blocks * (i + 1) / slices;
        const bool last = i + 1 == slices;
        Sums* sum = sums;
        for (int64_t tile = begin; tile < end; tile += 2) {
            const std::uint16_t* const first = bfloats(w, tile, from, to, slice);
            const std::uint16_t* const second =
                tile + 1 < end ? bfloats(w, tile + 1, from, to, slice + kSliceBlocks * kTile)
                               : first;
            for (int64_t panel = 0; panel < panels; panel += 2, ++sum) {
                const std::uint16_t* const rows = x.values + panel * x.stride + from * kTile;
                const Corner corner{w, y, panel, tile, x.m, end};
                Target targets[2][2];
                for (int p = 0; p < 2; ++p)
                    for (int t = 0; t < 2; ++t)
                        targets[p][t] = last ? corner.target(p, t, spare) : Target{(*sum)[p][t], 64};
                multiply({rows, panel + 1 < panels ? rows + x.stride : rows}, {first, second},
                         to - from, i ? sum : nullptr, targets);
                if (last)
                    for (int p = 0; p < 2; ++p)
                        for (int t = 0; t < 2; ++t) corner.finish(p, t, spare);
            }
        }
    }
    _tile_release();
}

// 32 elements -> bfloat16.
inline __m512i to_bfloat(const void* from, ScaleType type, int64_t count) {
    if (type == ScaleType::bfloat16) {
        sanitizer_reads(from, count * 2);
        return _mm512_maskz_loadu_epi16(count < 32 ? (1u << count) - 1 : ~0u, from);
    }
    alignas(64) float values[kBlock];
    Avx512::widen(from, type, values, static_cast<int>(count));
    return in_order(_mm512_load_ps(values), _mm512_load_ps(values + 16));
}

void write_bfloat(const Rows& x, const BfloatInput& to) {
    for (int64_t i = 0; i < kPanelRows; ++i) {
        std::uint16_t* out = to.values + i * kBlock;
        for (int64_t at = 0; at < x.k; at += kBlock, out += kTile) {
            const int64_t count = x.k - at < kBlock ? x.k - at : kBlock;
            _mm512_store_si512(out, i < x.m ? to_bfloat(element(x, i, at), x.type, count)
                                            : _mm512_setzero_si512());
        }
    }
}

constexpr Kernels with_tiles() {
    Kernels kernels = make_kernels<Avx512>();
    kernels.write_bfloat = write_bfloat;
    kernels.bfloat_tiles = bfloat_tiles;
    return kernels;
}

}  // namespace

const Kernels kKernelsAmx = with_tiles();

}  // namespace shallow
