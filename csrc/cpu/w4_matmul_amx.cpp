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
void unpack_codes(const TileView& w, int64_t tile, int64_t begin, int64_t end, std::uint16_t* out) {
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
                weights[byte] = _mm512_fmadd_ps(Avx512::code<C>(w, chunk, byte), scale[s], min[s]);
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

void unpack_half(const TileView& w, int64_t tile, int64_t begin, int64_t end, std::uint16_t* out) {
    const uint8_t* weights = w.block(tile, begin);
    for (int64_t k = begin * kBlock; k < end * kBlock; k += 2, weights += 64, out += 32)
        _mm512_storeu_si512(out, pair(Avx512::load_half(weights), Avx512::load_half(weights + 32)));
}

const std::uint16_t* bfloats(const TileView& w, int64_t tile, int64_t begin, int64_t end,
                             std::uint16_t* scratch) {
    switch (w.kind) {
        case Codes::bfloat16: return reinterpret_cast<const std::uint16_t*>(w.block(tile, begin));
        case Codes::float16: unpack_half(w, tile, begin, end, scratch); break;
        case Codes::six: unpack<Codes::six>(w, tile, begin, end, scratch); break;
        case Codes::byte: unpack<Codes::byte>(w, tile, begin, end, scratch); break;
        case Codes::nibble_table: unpack<Codes::nibble_table>(w, tile, begin, end, scratch); break;
        default: unpack<Codes::nibble>(w, tile, begin, end, scratch);
    }
    return scratch;
}

using Sums = float[2][kPanelRows * kTileRows];  // of a panel and two tiles

// Where a tile of sums is to lie.
struct Target {
    float* data;
    int64_t stride;  // bytes between rows
};

// `before`, if any, and the products of `blocks` blocks of a panel and two tiles, or one tile twice.
void multiply(const std::uint16_t* x, const std::uint16_t* const (&w)[2], int64_t blocks,
              const Sums* before, const Target (&to)[2]) {
    sanitizer_reads(x, blocks * kTile * sizeof *x);
    for (int t = 0; t < 2; ++t) {
        sanitizer_reads(w[t], blocks * kTile * sizeof *x);
        for (int row = 0; row < kPanelRows; ++row)
            sanitizer_writes(to[t].data + row * to[t].stride / 4, 64);
    }
    if (before) {
        _tile_loadd(0, (*before)[0], 64);
        _tile_loadd(1, (*before)[1], 64);
    } else {
        _tile_zero(0);
        _tile_zero(1);
    }
    for (int64_t at = 0; at < blocks * kTile; at += kTile) {
        _tile_stream_loadd(2, x + at, 64);
        _tile_loadd(3, w[0] + at, 64);
        _tile_dpbf16ps(0, 2, 3);
        _tile_loadd(3, w[1] + at, 64);
        _tile_dpbf16ps(1, 2, 3);
    }
    _tile_stored(0, to[0].data, to[0].stride);
    _tile_stored(1, to[1].data, to[1].stride);
}

// A panel and two tiles of y, of which some may lie outside or need more than a store.
struct Corner {
    const TileView& w;
    const Output& y;
    int64_t panel, tile, m, tiles;

    // Sums of whole tiles go to y at once. Its lines are fetched while the tiles are multiplied: a
    // prefill is 4 % slower without (benchmarks/results/decoder.md).
    Target target(int t, Sums& spare) const {
        const int64_t row = panel * kPanelRows, column = (tile + t) * kTileRows;
        if (!whole(t)) return {spare[t], 64};
        float* const data = static_cast<float*>(y.data) + row * y.stride + column;
        for (int i = 0; i < kPanelRows; ++i) __builtin_prefetch(data + i * y.stride, 1);
        return {data, y.stride * 4};
    }
    void finish(int t, const Sums& spare) const {
        if (whole(t) || tile + t >= tiles) return;
        Place at{};
        at.tile = tile + t;
        at.panel = panel;
        at.column = (tile + t) * kTileRows;
        at.n = w.n;
        const int64_t left = m - panel * kPanelRows;
        write<Avx512>(spare[t], static_cast<int>(left < kPanelRows ? left : kPanelRows), y, at);
    }

private:
    bool whole(int t) const {
        return y.type == ScaleType::float32 && !y.bias && (panel + 1) * kPanelRows <= m &&
               tile + t < tiles && (tile + t + 1) * kTileRows <= w.n;
    }
};

// Blocks from..to-1 of the tiles tile..tile + 1, fetched a part at a time while rows meet others:
// they come from memory, in pieces too short for the processor to foresee them. A prefill of a billion
// weights was 6 % faster, by three tiles (benchmarks/results/decoder.md).
class Ahead {
public:
    Ahead(const TileView& w, int64_t tile, int64_t end, int64_t from, int64_t to)
        : data_(w.data + tile * w.tile_bytes + from / w.run_blocks * w.run_bytes),
          tile_bytes_(w.tile_bytes), tiles_(tile + 1 < end ? 2 : 1),
          lines_((w.block(tile, to - 1) + w.block_bytes - data_ + 63) / 64) {}

    void fetch(int64_t part, int64_t parts) const {
        for (int64_t line = lines_ * part / parts; line < lines_ * (part + 1) / parts; ++line)
            for (int64_t t = 0; t < tiles_; ++t)
                __builtin_prefetch(data_ + t * tile_bytes_ + 64 * line, 0, 2);
    }

private:
    const uint8_t* data_;
    int64_t tile_bytes_, tiles_, lines_;
};

void bfloat_tiles(const TileView& w, const BfloatInput& x, const Output& y, int64_t begin,
                  int64_t end, uint8_t* scratch) {
    const TileConfig config;
    _tile_loadconfig(&config);
    auto* const slice = reinterpret_cast<std::uint16_t*>(scratch);
    auto* const sums = reinterpret_cast<Sums*>(scratch + 2 * kSliceBlocks * kTile * 2);
    const int64_t panels = (x.m + kPanelRows - 1) / kPanelRows;
    const int64_t slices = (w.blocks + kSliceBlocks - 1) / kSliceBlocks;
    const auto first_of = [&](int64_t i) { return w.blocks * i / slices; };
    alignas(64) Sums spare;

    for (int64_t i = 0; i < slices; ++i) {
        const int64_t from = first_of(i), to = first_of(i + 1);
        const bool last = i + 1 == slices;
        Sums* sum = sums;
        for (int64_t tile = begin; tile < end; tile += 2) {
            const std::uint16_t* const first = bfloats(w, tile, from, to, slice);
            const std::uint16_t* const second =
                tile + 1 < end ? bfloats(w, tile + 1, from, to, slice + kSliceBlocks * kTile)
                               : first;
            // In this slice, or from the first tile in the next one.
            const bool along = tile + 2 < end;
            const int64_t then = along || last ? i : i + 1;
            const Ahead ahead(w, along ? tile + 2 : begin, end, first_of(then), first_of(then + 1));
            for (int64_t panel = 0; panel < panels; ++panel, ++sum) {
                ahead.fetch(panel, panels);
                const Corner corner{w, y, panel, tile, x.m, end};
                Target targets[2];
                for (int t = 0; t < 2; ++t)
                    targets[t] = last ? corner.target(t, spare) : Target{(*sum)[t], 64};
                multiply(x.values + panel * x.stride + from * kTile, {first, second}, to - from,
                         i ? sum : nullptr, targets);
                for (int t = 0; last && t < 2; ++t) corner.finish(t, spare);
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
