// AMX's tiles and AVX-VNNI on a processor with AVX-512, for tests: setup.py compiles what is meant for
// either with this header before it (SHALLOW_EMULATE, `make emulate-x86`), so that what the machine at
// hand lacks runs all the same, slowly. AddressSanitizer sees what tiles read and write here.
//
// What faults on AMX ends the process with a message: a tile that is not configured, or more of it than
// there is, and products of tiles whose sizes do not go together. Unlike AMX, denormals are kept.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#define __AVXVNNI__ 1  // as by the compiler where it may use them
#define _mm256_dpbusd_avx_epi32 _mm256_dpbusd_epi32
#define _mm256_dpwssd_avx_epi32 _mm256_dpwssd_epi32

namespace shallow {
namespace {

// The eight tile registers of a thread.
class Tiles {
public:
    static Tiles& get() {
        thread_local Tiles tiles;
        return tiles;
    }

    void configure(const void* config) {
        const auto* const bytes = static_cast<const std::uint8_t*>(config);
        if (bytes[0] != 1 || bytes[1] != 0) fail("palette 1 and no row to go on with");
        for (int i = 0; i < kTiles; ++i) {
            std::uint16_t row_bytes;
            std::memcpy(&row_bytes, bytes + 16 + 2 * i, 2);
            tiles_[i] = Tile{bytes[48 + i], row_bytes, {}};
            if (tiles_[i].rows > kRows || row_bytes > kRowBytes || row_bytes % 4 ||
                !tiles_[i].rows != !row_bytes)
                fail("up to 16 rows of up to 64 bytes");
        }
    }
    void release() { *this = Tiles(); }
    void zero(int i) { std::memset(used(i).data, 0, sizeof(Tile::data)); }
    void load(int i, const void* from, std::int64_t stride) {
        zero(i);
        Tile& tile = used(i);
        for (int row = 0; row < tile.rows; ++row)
            std::memcpy(tile.data[row], static_cast<const char*>(from) + row * stride,
                        tile.row_bytes);
    }
    void store(int i, void* to, std::int64_t stride) {
        const Tile& tile = used(i);
        for (int row = 0; row < tile.rows; ++row)
            std::memcpy(static_cast<char*>(to) + row * stride, tile.data[row], tile.row_bytes);
    }
    // c (M, N) += a (M, 2 K) @ b (K, N, 2) of bfloat16: even and odd columns of a apart.
    void add_bfloats(int c, int a, int b) {
        const __m512i high = _mm512_set1_epi32(-65536);
        multiply(c, a, b, [&](int row) {
            __m512 even = _mm512_setzero_ps(), odd = even;
            for (int k = 0; k < tiles_[b].rows; ++k) {
                const __m512i x = _mm512_set1_epi32(word(a, row, k)), w = line(b, k);
                even = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(x, 16)),
                                       _mm512_castsi512_ps(_mm512_slli_epi32(w, 16)), even);
                odd = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(x, high)),
                                      _mm512_castsi512_ps(_mm512_and_si512(w, high)), odd);
            }
            const __m512 sum =
                _mm512_add_ps(_mm512_castsi512_ps(line(c, row)), _mm512_add_ps(even, odd));
            return _mm512_castps_si512(sum);
        });
    }
    // The same of signed bytes by unsigned ones, four at a time, into 32 bits.
    void add_bytes(int c, int a, int b) {
        multiply(c, a, b, [&](int row) {
            __m512i sum = line(c, row);
            for (int k = 0; k < tiles_[b].rows; ++k)
                sum = _mm512_dpbusd_epi32(sum, line(b, k), _mm512_set1_epi32(word(a, row, k)));
            return sum;
        });
    }

private:
    static constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;
    struct Tile {
        int rows, row_bytes;  // 0: not configured
        alignas(64) std::uint8_t data[kRows][kRowBytes];
    };
    Tile tiles_[kTiles] = {};

    [[noreturn]] static void fail(const char* expected) {
        std::fprintf(stderr, "emulate: tiles: expected %s\n", expected);
        std::abort();
    }
    Tile& used(int i) {
        if (!tiles_[i].rows) fail("a tile that is configured");
        return tiles_[i];
    }
    __m512i line(int i, int row) const { return _mm512_load_si512(tiles_[i].data[row]); }
    std::int32_t word(int i, int row, int k) const {
        std::int32_t word;
        std::memcpy(&word, tiles_[i].data[row] + 4 * k, 4);
        return word;
    }
    template <class Sum>
    void multiply(int c, int a, int b, const Sum& sum) {
        const Tile &left = used(a), &right = used(b);
        Tile& to = used(c);
        if (c == a || c == b || a == b) fail("three tiles");
        if (left.rows != to.rows || right.row_bytes != to.row_bytes ||
            left.row_bytes != 4 * right.rows)
            fail("tiles of sizes that go together");
        const auto wanted = static_cast<__mmask16>((1u << to.row_bytes / 4) - 1);
        for (int row = 0; row < to.rows; ++row)
            _mm512_mask_storeu_epi32(to.data[row], wanted, sum(row));
    }
};

}  // namespace
}  // namespace shallow

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbsud
#define _tile_loadconfig(config) ::shallow::Tiles::get().configure(config)
#define _tile_release() ::shallow::Tiles::get().release()
#define _tile_zero(tile) ::shallow::Tiles::get().zero(tile)
#define _tile_loadd(tile, from, stride) ::shallow::Tiles::get().load(tile, from, stride)
#define _tile_stream_loadd(tile, from, stride) ::shallow::Tiles::get().load(tile, from, stride)
#define _tile_stored(tile, to, stride) ::shallow::Tiles::get().store(tile, to, stride)
#define _tile_dpbf16ps(c, a, b) ::shallow::Tiles::get().add_bfloats(c, a, b)
#define _tile_dpbsud(c, a, b) ::shallow::Tiles::get().add_bytes(c, a, b)
