// As AVX-512, but for the first products of bfloat16: tiles of 16 boundaries x 32 features.
#include <algorithm>
#include <cstring>

#include "cpu/angular.h"
#include "cpu/angular_vector_avx512.h"
#include "cpu/sanitize.h"

namespace shallow {
namespace {

constexpr int kSide = 16, kDepth = 32, kTileSize = kSide * kDepth;
constexpr int kSteps = 4;    // tiles of features whose products are summed in float32
constexpr int kAhead = 512;  // features between what is read and what is asked for

// Tile registers 0..3: sums; 4: rows; 5: the same or other rows, transposed.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64, "as the processor reads it");

void transpose(__m512i (&v)[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 4) {
        const __m512i a = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        const __m512i b = _mm512_unpackhi_epi32(v[i], v[i + 1]);
        const __m512i c = _mm512_unpacklo_epi32(v[i + 2], v[i + 3]);
        const __m512i d = _mm512_unpackhi_epi32(v[i + 2], v[i + 3]);
        t[i] = _mm512_unpacklo_epi64(a, c);
        t[i + 1] = _mm512_unpackhi_epi64(a, c);
        t[i + 2] = _mm512_unpacklo_epi64(b, d);
        t[i + 3] = _mm512_unpackhi_epi64(b, d);
    }
    for (int i = 0; i < 4; ++i) {  // t[i], t[4 + i], ..: column 4 k + i in the k-th quarters
        const __m512i a = _mm512_shuffle_i32x4(t[i], t[4 + i], 0x44);
        const __m512i b = _mm512_shuffle_i32x4(t[i], t[4 + i], 0xee);
        const __m512i c = _mm512_shuffle_i32x4(t[8 + i], t[12 + i], 0x44);
        const __m512i d = _mm512_shuffle_i32x4(t[8 + i], t[12 + i], 0xee);
        v[i] = _mm512_shuffle_i32x4(a, c, 0x88);
        v[4 + i] = _mm512_shuffle_i32x4(a, c, 0xdd);
        v[8 + i] = _mm512_shuffle_i32x4(b, d, 0x88);
        v[12 + i] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
}

// Sums of a strip's rows with those of `Strips` strips, (Strips, 16, 16), over `steps` tiles.
template <int Strips>
void multiply_tiles(const Bfloat* rows, const Bfloat* columns, int steps, float* sums) {
    constexpr int kStrip = kSteps * kTileSize;
    sanitizer_reads(rows, steps * kTileSize * sizeof *rows);
    for (int strip = 0; strip < Strips; ++strip)
        sanitizer_reads(columns + strip * kStrip, steps * kTileSize * sizeof *columns);
    sanitizer_writes(sums, Strips * kSide * kSide * sizeof *sums);
    _tile_zero(0);
    if constexpr (Strips > 1) _tile_zero(1);
    if constexpr (Strips > 2) _tile_zero(2);
    if constexpr (Strips > 3) _tile_zero(3);
    for (int k = 0; k < steps * kTileSize; k += kTileSize) {
        _tile_loadd(4, rows + k, 64);
        _tile_loadd(5, columns + k, 64);
        _tile_dpbf16ps(0, 4, 5);
        if constexpr (Strips > 1) {
            _tile_loadd(5, columns + kStrip + k, 64);
            _tile_dpbf16ps(1, 4, 5);
        }
        if constexpr (Strips > 2) {
            _tile_loadd(5, columns + 2 * kStrip + k, 64);
            _tile_dpbf16ps(2, 4, 5);
        }
        if constexpr (Strips > 3) {
            _tile_loadd(5, columns + 3 * kStrip + k, 64);
            _tile_dpbf16ps(3, 4, 5);
        }
    }
    _tile_stored(0, sums, 64);
    if constexpr (Strips > 1) _tile_stored(1, sums + kSide * kSide, 64);
    if constexpr (Strips > 2) _tile_stored(2, sums + 2 * kSide * kSide, 64);
    if constexpr (Strips > 3) _tile_stored(3, sums + 3 * kSide * kSide, 64);
}

class BfloatTiles {
public:
    explicit BfloatTiles(int R)
        : R_(R), strips_((R + kSide - 1) / kSide), rows_(bytes()), columns_(bytes()),
          sums_(sizeof(double) * strips_ * strips_ * kSide * kSide) {
        std::memset(rows_.data, 0, bytes());  // boundaries past R stay 0
        const TileConfig config;
        _tile_loadconfig(&config);
    }
    ~BfloatTiles() { _tile_release(); }

    // gram (R, R), its upper triangle, of D features of row(0) .. row(R - 1).
    template <class Row>
    void multiply(Row&& row, int64_t D, double* gram) {
        auto* const sums = static_cast<double*>(sums_.data);
        std::fill_n(sums, strips_ * strips_ * kSide * kSide, 0.0);
        for (int64_t d = 0; d < D; d += kSteps * kDepth) {
            const int n = int(std::min<int64_t>(kSteps * kDepth, D - d));
            const int steps = (n + kDepth - 1) / kDepth;
            for (int s = 0; s < strips_; ++s)
                for (int k = 0; k < steps; ++k)
                    stage(row, s, k, d + k * kDepth, std::min(kDepth, n - k * kDepth));
            for (int s = 0; s < strips_; ++s)
                for (int t = s; t < strips_; t += 4) add_products(s, t, steps);
        }
        for (int i = 0; i < R_; ++i)
            for (int j = i; j < R_; ++j)
                gram[i * R_ + j] =
                    sums[((i / kSide * strips_ + j / kSide) * kSide + i % kSide) * kSide +
                         j % kSide];
    }

private:
    size_t bytes() const { return sizeof(Bfloat) * strips_ * kSteps * kTileSize; }
    static Bfloat* tile(const Scratch& from, int strip, int step) {
        return static_cast<Bfloat*>(from.data) + (strip * kSteps + step) * kTileSize;
    }

    template <class Row>
    void stage(Row&& row, int strip, int step, int64_t d, int n) {
        const __mmask32 some = n == kDepth ? ~0u : (1u << n) - 1;
        const int count = std::min(kSide, R_ - strip * kSide);
        Bfloat* const rows = tile(rows_, strip, step);
        for (int r = 0; r < count; ++r) {
            const Bfloat* source = row(strip * kSide + r) + d;
            __builtin_prefetch(source + kAhead, 0, 2);
            sanitizer_reads(source, n * sizeof *source);
            _mm512_store_si512(rows + r * kDepth, _mm512_maskz_loadu_epi16(some, source));
        }
        __m512i v[kSide];
        for (int r = 0; r < kSide; ++r) v[r] = _mm512_load_si512(rows + r * kDepth);
        transpose(v);
        Bfloat* const columns = tile(columns_, strip, step);
        for (int r = 0; r < kSide; ++r) _mm512_store_si512(columns + r * kDepth, v[r]);
    }

    // Strip s with strips t .. t + 3, as far as there are.
    void add_products(int s, int t, int steps) {
        alignas(64) float found[4 * kSide * kSide];
        const Bfloat *rows = tile(rows_, s, 0), *columns = tile(columns_, t, 0);
        const int count = std::min(4, strips_ - t);
        switch (count) {
            case 1: multiply_tiles<1>(rows, columns, steps, found); break;
            case 2: multiply_tiles<2>(rows, columns, steps, found); break;
            case 3: multiply_tiles<3>(rows, columns, steps, found); break;
            default: multiply_tiles<4>(rows, columns, steps, found);
        }
        double* sums = static_cast<double*>(sums_.data) + (s * strips_ + t) * kSide * kSide;
        for (int k = 0; k < count * kSide * kSide; k += Wide::W)
            Wide::fold(sums + k, Wide::load(found + k));
    }

    const int R_, strips_;
    // rows: (strips, kSteps, 16 rows, 32); columns: (strips, kSteps, 16 pairs of features, 16 rows,
    // 2); sums: (strips, strips, 16, 16)
    Scratch rows_, columns_, sums_;
};

}  // namespace
}  // namespace shallow

#include "cpu/angular_kernel.h"

void shallow::angular_amx(const AngularJob& job, int64_t begin, int64_t end, double* sums) {
    run_typed(job, begin, end, sums);
}
