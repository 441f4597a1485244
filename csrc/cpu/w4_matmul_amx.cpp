// AVX-512 for a few rows of x; for many, weights are unpacked to bfloat16 and multiplied as tiles
// of 16 x 32 that add in float32: no scale is left to apply to the sums.
#include "cpu/w4_vector_avx512.h"

namespace shallow {
namespace {

constexpr int64_t kTile = kTileRows * kBlock;  // elements of one block of one tile or panel

// Tile registers 0..3: sums of 2 panels x 2 tiles; 4, 5: a block of each panel; 6, 7: of each tile.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64, "as the processor reads it");

// Two columns of weights, rounded to bfloat16 side by side. A tie goes away from zero.
inline __m512i pair(__m512 even, __m512 odd) {
    const __m512i half = _mm512_set1_epi32(0x8000);
    const __m512i low = _mm512_add_epi32(_mm512_castps_si512(even), half);
    const __m512i high = _mm512_add_epi32(_mm512_castps_si512(odd), half);
    return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(low, 16), high);
}

template <Codes C, bool Split>
void unpack_bfloat(const TileView& w, int64_t tile, std::uint16_t* out) {
    const uint8_t* block = w.codes + tile * w.blocks * w.block_bytes;
    Params<Avx512, C> params(w, tile);
    __m512 scale[2], min[2];
    for (int64_t b = 0, left = 0; b < w.blocks; ++b) {
        if (left-- == 0) {
            for (int s = 0; s < 1 + Split; ++s) params.next(scale + s, min + s);
            left = Split ? 0 : w.group_blocks - 1;
        }
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
        block += w.block_bytes;
    }
}

void unpack_half(const TileView& w, int64_t tile, std::uint16_t* out) {
    const uint8_t* weights = w.codes + tile * w.blocks * w.block_bytes;
    for (int64_t k = 0; k < w.blocks * kBlock; k += 2, weights += 64, out += 32)
        _mm512_storeu_si512(
            out, pair(Avx512::load_half(weights), Avx512::load_half(weights + 32)));
}

// One tile as (blocks, 16 column pairs, 16 rows, 2) bfloat16.
const std::uint16_t* bfloats(const TileView& w, int64_t tile, std::uint16_t* scratch) {
    const bool split = w.group_blocks == 0;
    switch (w.kind) {
        case Codes::bfloat16:
            return reinterpret_cast<const std::uint16_t*>(w.codes) + tile * w.blocks * kTile;
        case Codes::float16: unpack_half(w, tile, scratch); break;
        case Codes::byte:
            split ? unpack_bfloat<Codes::byte, true>(w, tile, scratch)
                  : unpack_bfloat<Codes::byte, false>(w, tile, scratch);
            break;
        case Codes::nibble_table:
            split ? unpack_bfloat<Codes::nibble_table, true>(w, tile, scratch)
                  : unpack_bfloat<Codes::nibble_table, false>(w, tile, scratch);
            break;
        default:
            split ? unpack_bfloat<Codes::nibble, true>(w, tile, scratch)
                  : unpack_bfloat<Codes::nibble, false>(w, tile, scratch);
    }
    return scratch;
}

// sums[p][t]: panel p of two times tile t of two, (16 rows of x, 16 of W). The second of a pair
// may be the first again.
void multiply(const std::uint16_t* const (&x)[2], const std::uint16_t* const (&w)[2],
              int64_t blocks, float (&sums)[2][2][kPanelRows * kTileRows]) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t at = 0; at < blocks * kTile; at += kTile) {
        _tile_loadd(4, x[0] + at, 64);
        _tile_loadd(6, w[0] + at, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, w[1] + at, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, x[1] + at, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums[0][0], 64);
    _tile_stored(1, sums[0][1], 64);
    _tile_stored(2, sums[1][0], 64);
    _tile_stored(3, sums[1][1], 64);
}

void bfloat_tiles(const TileView& w, const BfloatInput& x, const Output& y, int64_t begin,
                  int64_t end, std::uint16_t* scratch) {
    const TileConfig config;
    _tile_loadconfig(&config);
    const int64_t size = w.blocks * kTile, panels = (x.m + kPanelRows - 1) / kPanelRows;
    const bool plain = w.kind == Codes::bfloat16;
    const std::uint16_t* const first = bfloats(w, begin, scratch);
    for (int64_t tile = begin + 1; tile < end && !plain; ++tile)
        bfloats(w, tile, scratch + (tile - begin) * size);

    alignas(64) float sums[2][2][kPanelRows * kTileRows];
    for (int64_t panel = 0; panel < panels; panel += 2) {
        const int64_t panel2 = panel + 1 < panels ? panel + 1 : panel;
        for (int64_t tile = begin; tile < end; tile += 2) {
            const int64_t tile2 = tile + 1 < end ? tile + 1 : tile;
            multiply({x.values + panel * size, x.values + panel2 * size},
                     {first + (tile - begin) * size, first + (tile2 - begin) * size}, w.blocks,
                     sums);
            for (int64_t p = panel; p <= panel2; ++p)
                for (int64_t t = tile; t <= tile2; ++t) {
                    const int64_t left = x.m - p * kPanelRows;
                    write<Avx512>(sums[p - panel][t - tile],
                                  static_cast<int>(left < kPanelRows ? left : kPanelRows), y,
                                  {t, p, 0, t * kTileRows, w.n});
                }
        }
    }
    _tile_release();
}

void narrow(const Rows& x, const TileView& w, const BfloatInput& to, int64_t panel) {
    for (int64_t i = 0; i < kPanelRows; ++i) {
        const int64_t row = panel * kPanelRows + i;
        for (int64_t b = 0; b < w.blocks; ++b) {
            auto* const out = reinterpret_cast<__m256i*>(
                to.values + ((panel * w.blocks + b) * kPanelRows + i) * kBlock);
            alignas(64) float values[kBlock] = {};
            const int64_t left = x.k - b * kBlock;
            if (row < x.m)
                Avx512::widen(element(x, row, b * kBlock), x.type, values,
                              static_cast<int>(left < kBlock ? left : kBlock));
            _mm256_storeu_si256(out, Avx512::to_bfloat(_mm512_load_ps(values)));
            _mm256_storeu_si256(out + 1, Avx512::to_bfloat(_mm512_load_ps(values + 16)));
        }
    }
}

constexpr Kernels with_tiles() {
    Kernels kernels = make_kernels<Avx512>();
    kernels.narrow = narrow;
    kernels.bfloat_tiles = bfloat_tiles;
    return kernels;
}

}  // namespace

const Kernels kKernelsAmx = with_tiles();

}  // namespace shallow
