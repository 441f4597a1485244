// AVX-512 for few rows of queries; many meet keys and values as tiles of bfloat16 that add in
// float32. A page of keys or values is turned into tiles once for all rows: attention of a prefill of 512
// tokens went from 41 to 22 ms (benchmarks/results/decoder.md).
#include "cpu/lanes_avx512.h"
#include "cpu/amx_tiles.h"
#include "cpu/attention_kernel.h"

namespace shallow {
namespace {

constexpr int64_t kLeastRows = 32;      // from here on a page is turned into tiles
constexpr int64_t kSteps = kPage / 32;  // tiles along a page's positions

// c (rows, 16 * columns) = or += a (rows, 32 * steps) @ b; rows by 16, columns by 2. b: (columns,
// room, kTile), the first `steps` of each.
struct TileProduct {
    const std::uint16_t* a;
    int64_t a_stride;
    const std::uint16_t* b;
    int64_t steps, room;
    float* c;
    int64_t c_stride;

    void run(int64_t rows, int64_t columns, bool fresh) const {
        for (int64_t row = 0; row < rows; row += 16)
            for (int64_t column = 0; column < columns; column += 2) add(row, column, fresh);
    }
    void add(int64_t row, int64_t column, bool fresh) const {
        float* const sums = c + row * c_stride + column * 16;
        const std::uint16_t* left = a + row * a_stride;
        const std::uint16_t* right = b + column * room * kTile;
        const int64_t a_bytes = a_stride * 2, c_bytes = c_stride * 4;
        for (int64_t r = 0; r < 16; ++r) {
            sanitizer_reads(left + r * a_stride, steps * 32 * sizeof *left);
            sanitizer_writes(sums + r * c_stride, 32 * sizeof *sums);
        }
        for (const int64_t tile : {int64_t{0}, room})
            sanitizer_reads(right + tile * kTile, steps * kTile * sizeof *right);
        if (fresh) {
            _tile_zero(0);
            _tile_zero(1);
        } else {
            _tile_loadd(0, sums, c_bytes);
            _tile_loadd(1, sums + 16, c_bytes);
        }
        for (int64_t step = 0; step < steps; ++step, left += 32, right += kTile) {
            _tile_loadd(2, left, a_bytes);
            _tile_loadd(3, right, 64);
            _tile_dpbf16ps(0, 2, 3);
            _tile_loadd(3, right + room * kTile, 64);
            _tile_dpbf16ps(1, 2, 3);
        }
        _tile_stored(0, sums, c_bytes);
        _tile_stored(1, sums + 16, c_bytes);
    }
};

// Keys of `stripes` stripes as tiles: (positions / 16, head_dim / 32, kTile).
template <class T>
void round_keys(const T* keys, int64_t head_dim, int64_t stripes, std::uint16_t* to) {
    for (int64_t s = 0; s < stripes; ++s, keys += kStripe * head_dim)
        for (int64_t half = 0; half < kStripe; half += 16)
            for (int64_t e = 0; e < head_dim; e += 2, to += 32) {
                const T* const key = keys + e * kStripe + half;
                _mm512_storeu_si512(to, pair(Lanes::load(key), Lanes::load(key + kStripe)));
            }
}

// Values of `positions` positions as tiles: (width / 16, kSteps, kTile); zeros behind the last.
template <class T>
void round_values(const T* values, int64_t width, int64_t positions, int64_t steps,
                  std::uint16_t* to) {
    for (int64_t p = 0; p < 32 * steps; p += 2)
        for (int64_t e = 0; e < width; e += 16) {
            const T* const value = values + p * width + e;
            const F even = p < positions ? Lanes::load(value) : Lanes::set(0);
            const F odd = p + 1 < positions ? Lanes::load(value + width) : Lanes::set(0);
            _mm512_storeu_si512(to + (e / 16 * kSteps + p / 32) * kTile + p % 32 * 16,
                                pair(even, odd));
        }
}

void round_row(const float* from, int64_t n, std::uint16_t* to) {
    for (int64_t i = 0; i < n; i += 32)
        _mm512_storeu_si512(to + i, in_order(Lanes::load(from + i), Lanes::load(from + i + 16)));
}

template <class T>
void attend_tiles(const KvShape& shape, const Span& span, const Queries& queries,
                  const Attended& to, float* scratch) {
    const int64_t rows = queries.count * queries.heads, padded = (rows + 15) / 16 * 16;
    const int64_t width = shape.width, depth = width / 32;
    float* const scores = scratch;                                                // (padded, kPage)
    float* const sums = scores + padded * kPage;                                  // (padded, width)
    auto* const asked = reinterpret_cast<std::uint16_t*>(sums + padded * width);  // the same
    auto* const shares = asked + padded * width;                                  // (padded, kPage)
    auto* const keys = shares + padded * kPage;                                   // a page
    auto* const values = keys + kPage * width;                                    // a page
    auto* const factors = reinterpret_cast<float*>(values + kPage * width);       // (padded,)
    auto* const softmax = reinterpret_cast<Softmax*>(factors + padded);

    std::fill(sums, sums + padded * width, 0.0f);
    std::fill(asked, keys, std::uint16_t{0});
    for (int64_t r = 0; r < rows; ++r) {
        softmax[r] = Softmax();
        round_row(queries.row(r, shape.head_dim), width, asked + r * width);
    }
    const TileConfig config;
    _tile_loadconfig(&config);
    for (int64_t at = span.begin; at < span.end; at += kPage) {
        const Head<T> page(shape, span.pages[at / kPage], span.head);
        const int64_t positions = std::min(kPage, span.end - at), steps = (positions + 31) / 32;
        round_keys(page.keys, width, steps, keys);
        round_values(page.values, width, positions, steps, values);
        TileProduct product;
        product.a = asked;
        product.a_stride = width;
        product.b = keys;
        product.steps = product.room = depth;
        product.c = scores;
        product.c_stride = kPage;
        product.run(padded, 2 * steps, true);
        in_groups(rows, [&](auto group, int64_t row) {
            update<T, group()>(queries, row, at, positions, 32 * steps, page, softmax, scores,
                               factors);
        });
        for (int64_t r = 0; r < rows; ++r) {
            round_row(scores + r * kPage, 32 * steps, shares + r * kPage);
            if (factors[r] != 1)
                for (int64_t e = 0; e < width; e += 16)
                    Lanes::store(sums + r * width + e, Lanes::mul(Lanes::load(sums + r * width + e),
                                                                  Lanes::set(factors[r])));
        }
        product.a = shares;
        product.a_stride = kPage;
        product.b = values;
        product.steps = steps;
        product.room = kSteps;
        product.c = sums;
        product.c_stride = width;
        product.run(padded, width / 16, false);
    }
    _tile_release();
    write(shape, queries, softmax, sums, to);
}

void attend_amx(const KvShape& shape, const Span& span, const Span& next, const Queries& queries,
                const Attended& to, float* scratch) {
    const bool many = queries.count * queries.heads >= kLeastRows && shape.head_dim % 32 == 0;
    if (many && shape.type == KvType::float16)
        attend_tiles<std::uint16_t>(shape, span, queries, to, scratch);
    else if (many && shape.type == KvType::int8)
        attend_tiles<int8_t>(shape, span, queries, to, scratch);
    else
        attend(shape, span, next, queries, to, scratch);
}

constexpr AttentionKernels with_tiles() {
    AttentionKernels kernels = make_attention_kernels();
    kernels.attend = attend_amx;
    kernels.query_rows = 192;
    return kernels;
}

}  // namespace

const AttentionKernels kAttentionAmx = with_tiles();

}  // namespace shallow
