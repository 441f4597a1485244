#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <numeric>
#include <stdexcept>
#include <string>

#include "cpu/plan.h"
#include "cpu/threads.h"

namespace shallow {
namespace {

using std::int64_t;
using std::uint8_t;

constexpr int64_t kChunk = 64;                        // bytes
constexpr std::uint64_t kMagic = 0x34574c4c41485303;  // changes with the layout

int64_t scale_bytes(const w4::Matrix& matrix) {
    if (w4::has_supers(matrix.scheme)) return 1;
    return element_bytes(matrix.scale_type);
}

enum class Way { tile, restore };

template <Way way>
void copy(const void* packed, uint8_t* tiled, int64_t bytes) {
    if constexpr (way == Way::tile)
        std::memcpy(tiled, packed, static_cast<std::size_t>(bytes));
    else
        std::memcpy(const_cast<void*>(packed), tiled, static_cast<std::size_t>(bytes));
}

// 16 bytes of row codes (32 columns) -> one row of a nibble block.
inline void interleave_nibbles(const uint8_t* from, uint8_t* block) {
    std::uint16_t pairs[8];  // columns 2i, 2i + 1 below columns 16 + 2i, 17 + 2i
    for (int i = 0; i < 8; ++i) {
        const unsigned low = from[i], high = from[i + 8];
        const unsigned even = (low & 15) | (high & 15) << 4, odd = low >> 4 | (high & 0xf0);
        pairs[i] = static_cast<std::uint16_t>(even | odd << 8);
    }
    for (int chunk = 0; chunk < 4; ++chunk)
        std::memcpy(block + chunk * kChunk, pairs + chunk * 2, 4);
}

inline void restore_nibbles(const uint8_t* block, uint8_t* to) {
    std::uint16_t pairs[8];
    for (int chunk = 0; chunk < 4; ++chunk)
        std::memcpy(pairs + chunk * 2, block + chunk * kChunk, 4);
    for (int i = 0; i < 8; ++i) {
        const unsigned even = pairs[i] & 255, odd = pairs[i] >> 8;
        to[i] = static_cast<uint8_t>((even & 15) | (odd & 15) << 4);
        to[i + 8] = static_cast<uint8_t>(even >> 4 | (odd & 0xf0));
    }
}

int64_t tile_rows(int64_t n, int64_t tile) {
    return std::min<int64_t>(kTileRows, n - tile * kTileRows);
}

template <Way way>
void copy_codes(const w4::Matrix& packed, const TileView& tiled, int64_t tile) {
    const int64_t rows = tile_rows(packed.n, tile), width = packed.row_bytes();
    auto* const lines = const_cast<uint8_t*>(packed.codes) + tile * kTileRows * width;
    for (int64_t b = 0; b < tiled.blocks; ++b) {
        auto* const block = const_cast<uint8_t*>(tiled.block(tile, b));
        for (int64_t row = 0; row < rows; ++row) {
            uint8_t* const line = lines + row * width + b * 4 * packed.bits;
            uint8_t* const place = block + row * 4;
            if (packed.bits == 4 && way == Way::tile)
                interleave_nibbles(line, place);
            else if (packed.bits == 4)
                restore_nibbles(place, line);
            else
                for (int64_t byte = 0; byte < std::min<int64_t>(32, width - b * 32); byte += 4)
                    copy<way>(line + byte, place + byte / 4 * kChunk, 4);
        }
    }
}

// (n, groups) elements and their place in each record.
template <Way way>
void copy_params(const w4::Matrix& packed, const TileView& tiled, const void* array,
                 int64_t element, int64_t offset, int64_t tile) {
    const auto* const elements = static_cast<const uint8_t*>(array);
    const int64_t groups = packed.groups();
    for (int64_t row = 0; row < tile_rows(packed.n, tile); ++row)
        for (int64_t g = 0; g < groups; ++g)
            copy<way>(elements + ((tile * kTileRows + row) * groups + g) * element,
                      const_cast<uint8_t*>(tiled.record(tile, g)) + offset + row * element,
                      element);
}

template <Way way>
void copy_supers(const w4::Matrix& packed, const TileView& tiled, int64_t tile) {
    auto* const supers = const_cast<std::uint16_t*>(tiled.supers);
    const int64_t count = 2 * w4::ceil_div(packed.k, w4::kSuper);
    for (int64_t row = 0; row < tile_rows(packed.n, tile); ++row)
        for (int64_t i = 0; i < count; ++i)
            copy<way>(packed.supers + (tile * kTileRows + row) * count + i,
                      reinterpret_cast<uint8_t*>(supers + (tile * count + i) * kTileRows + row), 2);
}

// Between the canonical arrays and a view on writable tiles.
template <Way way>
void copy_tiles(const w4::Matrix& packed, const TileView& tiled, int threads) {
    const int64_t element = scale_bytes(packed), second = kTileRows * element;
    parallel_for(threads, tiled.tiles, 4, [&](int64_t begin, int64_t end) {
        for (int64_t tile = begin; tile < end; ++tile) {
            copy_codes<way>(packed, tiled, tile);
            copy_params<way>(packed, tiled, packed.scales, element, 0, tile);
            if (packed.zeros) copy_params<way>(packed, tiled, packed.zeros, 1, second, tile);
            if (packed.mins) copy_params<way>(packed, tiled, packed.mins, element, second, tile);
            if (tiled.supers) copy_supers<way>(packed, tiled, tile);
        }
    });
}

// The step for which 8-bit multiples come closest to all 16 values; returns the step and the
// relative RMS error.
std::pair<float, float> fit_step(const float* values) {
    double largest = 0, energy = 0;
    for (int i = 0; i < 16; ++i) {
        largest = std::max(largest, std::abs(double{values[i]}));
        energy += double{values[i]} * values[i];
    }
    if (largest == 0) return {1.0f, 0.0f};
    double best_step = 0, best = INFINITY;
    for (int i = 0; i < 256; ++i) {  // the largest value becomes 127, 126.75 .. 63.25
        const double step = largest / (127 - i / 4.0);
        double error = 0;
        for (int j = 0; j < 16; ++j) {
            const double miss = std::nearbyint(values[j] / step) * step - values[j];
            error += miss * miss;
        }
        if (error < best) best = error, best_step = step;
    }
    return {static_cast<float>(best_step), static_cast<float>(std::sqrt(best / energy))};
}

float element(const void* array, int64_t i, ScaleType type) {
    if (type == ScaleType::float32) return static_cast<const float*>(array)[i];
    const std::uint16_t bits = static_cast<const std::uint16_t*>(array)[i];
    return type == ScaleType::float16 ? w4::half_to_float(bits) : w4::bfloat_to_float(bits);
}

// d, and dmin 16 halves on, of a tile's 16 rows.
const std::uint16_t* super_of(const TileView& w, int64_t tile, int64_t group) {
    return w.supers + (tile * ((w.blocks + 7) / 8) + group / w.super_groups) * w.super_halves;
}

// The weights of one row of a tile in one group, by their codes, as w4::Matrix gives them.
class GroupWeights {
public:
    GroupWeights(const TileView& w, int64_t tile, int64_t group, int64_t lane) {
        const uint8_t* const record = w.record(tile, group);
        if (w4::has_supers(w.scheme)) {
            const std::uint16_t* const super = super_of(w, tile, group) + lane;
            const bool stepped = w.scheme == w4::Scheme::stepped;
            const int steps = stepped ? static_cast<std::int8_t>(record[lane]) : record[lane];
            scale_ = w4::product(w4::half_to_float(super[0]), static_cast<float>(steps));
            if (stepped)
                center_ = w.center;
            else
                low_ = -w4::product(w4::half_to_float(super[kTileRows]), record[kTileRows + lane]);
            return;
        }
        scale_ = element(record, lane, w.scale_type);
        const uint8_t* const second = record + kTileRows * element_bytes(w.scale_type);
        switch (w.scheme) {
            case w4::Scheme::minimum: low_ = element(second, lane, w.scale_type); break;
            case w4::Scheme::zero: center_ = second[lane]; break;
            case w4::Scheme::codebook: table_ = w.values; break;
            default: center_ = w.center;
        }
    }
    float operator()(int code) const {
        const float steps = table_ ? table_[code] : static_cast<float>(code) - center_;
        return w4::product(steps, scale_) + low_;
    }

private:
    const float* table_ = nullptr;
    float scale_, center_ = 0, low_ = -0.0f;  // which changes no number, zeros included
};

// Code i of a row's 16 in half a block of sixes, whose chunks are 64 bytes apart.
int six_at(const uint8_t* row, int64_t i) {
    if (i < 12) return row[i / 4 * kChunk + i % 4] & 63;
    const auto top = [&](int64_t chunk) { return row[chunk * kChunk + i % 4] >> 6; };
    return top(0) << 4 | top(1) << 2 | top(2);
}

// A row's 16 weights in half a block.
void read_codes(const TileView& w, int64_t row, int64_t half, float* out) {
    const int64_t tile = row / kTileRows, lane = row % kTileRows, block = half / 2, high = half % 2;
    const uint8_t* const codes = w.block(tile, block) + lane * 4;
    const GroupWeights weights(w, tile, w.group_blocks ? block / w.group_blocks : half, lane);
    for (int64_t i = 0; i < 16; ++i) {
        const int64_t at = i / 4 * kChunk + i % 4;
        if (w.kind == Codes::byte)
            out[i] = weights(codes[high * 4 * kChunk + at]);
        else if (w.kind == Codes::six)
            out[i] = weights(six_at(codes + high * 3 * kChunk, i));
        else
            out[i] = weights(high ? codes[at] >> 4 : codes[at] & 15);
    }
}
void read_floats(const TileView& w, int64_t row, int64_t half, float* out) {
    const int64_t tile = row / kTileRows, lane = row % kTileRows, first = half % 2 * 16;
    const uint8_t* const block = w.block(tile, half / 2);
    for (int64_t i = 0; i < 16; ++i) {
        const int64_t column = first + i;
        if (w.kind == Codes::bfloat16)
            out[i] = element(block, (column / 2 * kTileRows + lane) * 2 + column % 2,
                             ScaleType::bfloat16);
        else
            out[i] = element(block, column * kTileRows + lane,
                             w.kind == Codes::float32 ? ScaleType::float32 : ScaleType::float16);
    }
}

// One row of sixes as bytes, under scales and minimums that are numbers by themselves.
void restore_six(const TileView& w, int64_t row, const w4::Matrix& to) {
    const int64_t tile = row / kTileRows, lane = row % kTileRows;
    const bool minimum = to.scheme == w4::Scheme::minimum;
    const int centers = minimum ? 0 : 128 - 32;  // apart
    auto* const codes = const_cast<uint8_t*>(to.codes) + row * to.row_bytes();
    for (int64_t j = 0; j < w.k; ++j) {
        const uint8_t* const half = w.block(tile, j / kBlock) + j % kBlock / 16 * 3 * kChunk;
        codes[j] = static_cast<uint8_t>(six_at(half + lane * 4, j % 16) + centers);
    }
    for (int64_t g = 0; g < to.groups(); ++g) {
        const int64_t at = row * to.groups() + g;
        const uint8_t* const record = w.record(tile, g);
        if (!w4::has_supers(w.scheme)) {
            std::memcpy(static_cast<std::uint16_t*>(const_cast<void*>(to.scales)) + at,
                        record + lane * 2, 2);
            if (minimum)
                std::memcpy(static_cast<std::uint16_t*>(const_cast<void*>(to.mins)) + at,
                            record + (kTileRows + lane) * 2, 2);
            continue;
        }
        const std::uint16_t* const super = super_of(w, tile, g) + lane;
        const int steps = minimum ? record[lane] : static_cast<std::int8_t>(record[lane]);
        static_cast<float*>(const_cast<void*>(to.scales))[at] =
            w4::product(w4::half_to_float(super[0]), static_cast<float>(steps));
        if (minimum)
            static_cast<float*>(const_cast<void*>(to.mins))[at] =
                -w4::product(w4::half_to_float(super[kTileRows]), record[kTileRows + lane]);
    }
}

// What restore_six() is to be given.
bool takes_sixes(const TileView& w, const w4::Matrix& to) {
    const bool minimum = w.scheme == w4::Scheme::minimum || w.scheme == w4::Scheme::kquant;
    return to.bits == 8 && !to.perm && to.n == w.n && to.k == w.k &&
           to.group == (w.group_blocks ? w.group_blocks * kBlock : 16) &&
           to.scheme == (minimum ? w4::Scheme::minimum : w4::Scheme::symmetric) &&
           to.scale_type == (w4::has_supers(w.scheme) ? ScaleType::float32 : w.scale_type);
}

}  // namespace

void TileView::set_runs() {
    const int64_t whole = record_bytes ? kChunk / std::gcd(kChunk, record_bytes) : 1;
    run_groups = std::min(groups, group_blocks ? whole : std::max<int64_t>(whole, 2));
    run_blocks = group_blocks ? run_groups * group_blocks : run_groups / 2;
    head_bytes = w4::ceil_div(run_groups * record_bytes, kChunk) * kChunk;
    run_bytes = head_bytes + run_blocks * block_bytes;
    tile_bytes = w4::ceil_div(groups, run_groups) * head_bytes + blocks * block_bytes;
}

// What the bytes of a matrix begin with.
struct alignas(64) TiledMatrix::Header {
    std::uint64_t magic;
    TileView view;  // its pointers mean nothing
    bool permuted;
};

std::size_t TiledMatrix::place(bool permuted) {
    TileView& v = view_;
    Cutter cutter{bytes_, sizeof(Header)};
    v.set_runs();
    v.data = cutter.cut<uint8_t>(v.tiles * v.tile_bytes);
    v.supers =
        w4::has_supers(v.scheme)
            ? cutter.cut<std::uint16_t>(v.tiles * w4::ceil_div(v.k, w4::kSuper) * v.super_halves)
            : nullptr;
    perm_ = permuted ? cutter.cut<std::int32_t>(v.k) : nullptr;
    return static_cast<std::size_t>(cutter.used);
}

void TiledMatrix::allocate(bool permuted) {
    size_ = place(permuted);
    memory_ = Memory(size_);
    bytes_ = memory_.data();
    new (bytes_) Header{kMagic, view_, permuted};
    place(permuted);
}

TiledMatrix::TiledMatrix(std::uint8_t* bytes, std::size_t size) : bytes_(bytes), size_(size) {
    const auto* const header = reinterpret_cast<const Header*>(bytes);
    if (reinterpret_cast<std::uintptr_t>(bytes) % kChunk)
        throw std::invalid_argument("tiles must begin on a multiple of 64 bytes");
    if (size < sizeof(Header) || header->magic != kMagic)
        throw std::invalid_argument("these bytes are no tiles");
    std::uint8_t permuted;
    std::memcpy(&permuted, &header->permuted, sizeof permuted);
    if (permuted > 1 || !describe_as(header->view, size) || !fits(size))
        throw std::invalid_argument("these bytes are no tiles of a matrix");
    if (const std::size_t whole = place(permuted); whole != size)
        throw std::invalid_argument("tiles must have " + std::to_string(whole) + " bytes, found " +
                                    std::to_string(size));
    if (permuted && !w4::are_columns(perm_, view_.k))
        throw std::invalid_argument("tiles have a column that is none of the matrix's");
}

// The tiles of the view, whose sizes came with `size` bytes, are counted before they are multiplied.
bool TiledMatrix::fits(std::size_t size) {
    view_.set_runs();
    return view_.tiles <= static_cast<int64_t>(size) / view_.tile_bytes;
}

// Sets the view to that of `found`'s shape and spec, which came with `size` bytes; false where there is
// no such matrix.
bool TiledMatrix::describe_as(const TileView& found, std::size_t size) {
    constexpr int64_t kMostColumns = int64_t{1} << 30, kGroupBlocks = 4;  // of groups of 128
    const auto most = static_cast<int64_t>(size) * 8;  // of rows and columns of so many bytes
    const auto kind = static_cast<int>(found.kind), scheme = static_cast<int>(found.scheme);
    const auto type = static_cast<int>(found.scale_type);
    if (found.n < 1 || found.n > most || found.k < 1 || found.k > std::min(most, kMostColumns))
        return false;
    if (kind < 0 || kind > static_cast<int>(Codes::bfloat16) || type < 0 || type > 2) return false;
    if (kind >= static_cast<int>(Codes::float32)) {
        describe_dense(found.n, found.k,
                       found.kind == Codes::float32   ? ScaleType::float32
                       : found.kind == Codes::float16 ? ScaleType::float16
                                                      : ScaleType::bfloat16);
        return true;
    }
    const int64_t blocks = w4::ceil_div(found.k, kBlock), group = found.group_blocks;
    if (scheme < 0 || scheme > static_cast<int>(w4::Scheme::stepped)) return false;
    if (group < 0 || group > std::max(blocks, kGroupBlocks)) return false;
    const bool stepped = found.scheme == w4::Scheme::stepped;
    if (found.scheme == w4::Scheme::kquant ? group != 1 : stepped && group != 0) return false;
    if (found.kind == Codes::six ? found.scheme == w4::Scheme::zero : stepped) return false;
    w4::Matrix like{};
    like.n = found.n;
    like.k = found.k;
    like.bits = found.kind == Codes::byte ? 8 : found.kind == Codes::six ? 6 : 4;
    like.group = static_cast<std::int32_t>(group ? group * kBlock : 16);
    like.scheme = found.scheme;
    like.scale_type = found.scale_type;
    like.codebook = found.values;
    describe(like);
    return view_.kind == found.kind;
}

TiledMatrix::TiledMatrix(const w4::Matrix& matrix, std::uint8_t* tiles) {
    describe(matrix);
    TileView& v = view_;
    if (reinterpret_cast<std::uintptr_t>(tiles) % kChunk)
        throw std::invalid_argument("tiles must begin on a multiple of 64 bytes");
    size_ = place(matrix.perm);
    v.data = tiles;
    v.supers = matrix.supers;
    perm_ = const_cast<std::int32_t*>(matrix.perm);
}

std::size_t TiledMatrix::nbytes() const { return size_ - sizeof(Header); }

TiledMatrix::TiledMatrix(const w4::Matrix& matrix, int threads) : TiledMatrix(matrix) {
    if (matrix.perm) std::copy(matrix.perm, matrix.perm + matrix.k, perm_);
    fill(matrix, threads);
}

TiledMatrix::TiledMatrix(const w4::Matrix& matrix) {
    describe(matrix);
    allocate(matrix.perm);
}

void TiledMatrix::describe(const w4::Matrix& matrix) {
    TileView& v = view_;
    const int64_t element = scale_bytes(matrix);
    v.n = matrix.n;
    v.k = matrix.k;
    v.tiles = w4::ceil_div(v.n, kTileRows);
    v.blocks = w4::ceil_div(v.k, kBlock);
    v.group_blocks = matrix.group ? matrix.group / kBlock : v.blocks;
    v.groups = v.group_blocks ? w4::ceil_div(v.blocks, v.group_blocks) : 2 * v.blocks;
    const bool stepped = matrix.scheme == w4::Scheme::stepped;
    v.super_groups = stepped ? 16 : 8;
    v.super_halves = stepped ? kTileRows : 2 * kTileRows;
    v.kind = matrix.bits == 8 ? Codes::byte : matrix.bits == 6 ? Codes::six : Codes::nibble;
    v.block_bytes = matrix.bits * kChunk;
    v.scheme = matrix.scheme;
    v.scale_type = matrix.scale_type;
    v.center = static_cast<float>(1 << (matrix.bits - 1));
    v.record_bytes = kTileRows * element;
    if (v.scheme == w4::Scheme::zero) v.record_bytes += kTileRows;
    if (v.scheme == w4::Scheme::minimum || v.scheme == w4::Scheme::kquant)
        v.record_bytes += kTileRows * element;
    for (int i = 0; i < 16; ++i) v.values[i] = static_cast<float>(i);
    if (v.scheme == w4::Scheme::codebook) {
        constexpr float kWorstFit = 0.005f;  // NF4: 0.0033
        const auto [step, error] = fit_step(matrix.codebook);
        v.kind = Codes::nibble_table;
        v.values8_step = error <= kWorstFit ? step : 0.0f;
        for (int i = 0; i < 16; ++i) {
            v.values[i] = matrix.codebook[i];
            v.values8[i] = static_cast<uint8_t>(128 + std::lrint(v.values[i] / double{step}));
        }
    }
    v.set_runs();
}

bool TiledMatrix::of_kind(const w4::Matrix& m) const {
    const TileView& v = view_;
    return m.k == v.k && m.scheme == v.scheme && !m.perm == !perm_ &&
           m.scale_type == v.scale_type && v.block_bytes == m.bits * kChunk &&
           (m.group ? m.group / kBlock : v.blocks) == v.group_blocks;
}

bool TiledMatrix::holds(const w4::Matrix& m) const {
    return view_.kind == Codes::six ? takes_sixes(view_, m) : of_kind(m) && m.n == view_.n;
}

void TiledMatrix::fill(const w4::Matrix& from, int threads) {
    if (!of_kind(from) || from.n != view_.n)
        throw std::invalid_argument("tiles of another shape or spec");
    copy_tiles<Way::tile>(from, view_, threads);
}

void TiledMatrix::restore(const w4::Matrix& to, int threads) const {
    const TileView& v = view_;
    if (!holds(to)) throw std::invalid_argument("tiles of another shape or spec");
    if (v.kind == Codes::six)
        return parallel_for(threads, v.n, kTileRows, [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) restore_six(v, row, to);
        });
    copy_tiles<Way::restore>(to, v, threads);
    if (to.codebook) std::copy(v.values, v.values + 16, const_cast<float*>(to.codebook));
    if (to.perm) std::copy(perm_, perm_ + v.k, const_cast<std::int32_t*>(to.perm));
}

void TiledMatrix::describe_dense(int64_t n, int64_t k, ScaleType type) {
    TileView& v = view_;
    v.n = n;
    v.k = k;
    v.tiles = w4::ceil_div(n, kTileRows);
    v.blocks = w4::ceil_div(k, kBlock);
    v.group_blocks = v.blocks;
    v.groups = 1;
    v.kind = type == ScaleType::float32   ? Codes::float32
             : type == ScaleType::float16 ? Codes::float16
                                          : Codes::bfloat16;
    v.block_bytes = kBlock * kTileRows * element_bytes(type);
}

TiledMatrix::TiledMatrix(const void* weights, ScaleType type, int64_t n, int64_t k, int threads) {
    describe_dense(n, k, type);
    allocate(false);
    const TileView& v = view_;
    const int64_t element = element_bytes(type);
    const auto* const from = static_cast<const uint8_t*>(weights);
    auto* const tiles = const_cast<uint8_t*>(v.data);
    parallel_for(threads, v.tiles, 4, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin * kTileRows; row < std::min(n, end * kTileRows); ++row) {
            uint8_t* const tile = tiles + row / kTileRows * v.tile_bytes;
            const int64_t lane = row % kTileRows;
            for (int64_t j = 0; j < k; ++j) {
                const int64_t at = type == ScaleType::bfloat16
                                       ? (j / 2 * kTileRows + lane) * 2 + j % 2
                                       : j * kTileRows + lane;
                std::memcpy(tile + at * element, from + (row * k + j) * element,
                            static_cast<std::size_t>(element));
            }
        }
    });
}

void read_row(const TiledMatrix& matrix, int64_t row, float* out) {
    const TileView& w = matrix.view();
    const std::int32_t* const perm = matrix.perm();
    for (int64_t half = 0; half * 16 < w.k; ++half) {
        float values[16];
        if (w.kind >= Codes::float32)
            read_floats(w, row, half, values);
        else
            read_codes(w, row, half, values);
        for (int64_t i = 0, k = half * 16; i < 16 && k < w.k; ++i, ++k)
            out[perm ? perm[k] : k] = values[i];
    }
}

}  // namespace shallow
