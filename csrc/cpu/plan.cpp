#include "cpu/plan.h"

#include <algorithm>

namespace shallow {
namespace {

constexpr std::int64_t kThreadBytes = 32 << 10;  // of weights for each thread, by four rows of x
constexpr std::int64_t kCacheBytes = 1 << 20;    // of L2 for the activations that all tiles meet
constexpr std::int64_t kTilesBytes = 512 << 10;  // of L2 for tiles that rows meet together
constexpr std::int64_t kMostTogether = 4;        // more was slower (benchmarks/results/decoder.md)
constexpr std::int64_t kSumsBytes = 512 << 10;   // of L2 for sums that wait for the next columns
constexpr std::int64_t kLeastRows = 64, kMostRows = 512;  // at once
constexpr std::int64_t kLongShare = 1 << 20;              // bytes that a thread streams
// Of normal numbers bounds leave 0.6 % of the tiles by 576 columns, 3.5 by 2,048 and 19 by 4,096.
constexpr std::int64_t kBoundedBlocks = 64;

// An odd number of KiB: panels a power of two apart would share few cache sets.
std::int64_t bfloat_stride(std::int64_t blocks) { return (blocks | 1) * kBlock * kPanelRows; }

// A slice of two tiles, and the sums of panels and pairs of tiles.
std::int64_t bfloat_scratch_bytes(std::int64_t rows, std::int64_t tiles) {
    const std::int64_t pairs = w4::ceil_div(rows, kPanelRows) * w4::ceil_div(tiles, 2);
    return 2 * kSliceBlocks * kBlock * kTileRows * 2 + pairs * 2 * kPanelRows * kTileRows * 4;
}

template <class T>
void gather_as(const Rows& x, const std::int32_t* perm, T* to) {
    const T* from = static_cast<const T*>(x.data);
    for (std::int64_t row = 0; row < x.m; ++row, from += x.stride)
        for (std::int64_t j = 0; j < x.k; ++j) *to++ = from[perm[j]];
}

}  // namespace

std::int64_t tiles_together(const TileView& w) {
    return std::clamp<std::int64_t>(kTilesBytes / w.tile_bytes, 1, kMostTogether);
}

Path choose_path(const TileView& w, std::int64_t m, Mode mode, const Kernels& kernels) {
    if (mode == Mode::exact || w.kind == Codes::float32) return Path::exact;
    if (kernels.bfloat_tiles && m >= kManyRows) return Path::bfloat;
    const bool plain = w.kind == Codes::float16 || w.kind == Codes::bfloat16;
    const bool coarse = w.kind == Codes::nibble_table && w.values8_step == 0;
    if (plain || coarse) return Path::exact;
    const bool bytes = w.kind == Codes::byte || w.kind == Codes::nibble_table;
    return kernels.int16_tiles && bytes ? Path::int16 : Path::int8;
}

bool tells_largest(const TileView& w, Mode mode, const Kernels& kernels) {
    return kernels.bound_tiles && choose_path(w, 1, mode, kernels) == Path::int16 &&
           w.kind == Codes::byte && w.scheme == w4::Scheme::symmetric && w.center == 128 &&
           w.group_blocks && w.blocks <= kBoundedBlocks;
}

Form::Form(const TileView& like, Path path, std::int64_t m, bool fine)
    : path(path), fine(fine), m(m),
      panel(path == Path::bfloat ? kPanelRows : std::min<std::int64_t>(m, kPanelRows)),
      rows(w4::ceil_div(m, panel) * panel), blocks(like.blocks), groups(like.groups),
      group_blocks(like.group_blocks) {}

std::int64_t Form::nbytes() const {
    switch (path) {
        case Path::exact: return line_up(rows * blocks * kBlock * 4);
        case Path::bfloat: return rows / kPanelRows * bfloat_stride(blocks) * 2;
        case Path::int8:
        case Path::bounds:
            return line_up(2 * rows * blocks * kBlock) + line_up(2 * rows * blocks * 4) +
                   line_up(rows * groups * 4);
        case Path::int16:
            return line_up(2 * rows * blocks * kBlock) + line_up(rows * blocks * 4) +
                   line_up(rows * groups * 4);
    }
    return 0;
}

template <class T>
IntInput<T> Form::ints(std::uint8_t* base) const {
    constexpr std::int64_t kPlanes = sizeof(T) == 1 ? 2 : 1;
    Cutter cutter{base};
    IntInput<T> input;
    input.m = m;
    input.panel = panel;
    input.plane = rows * blocks;
    input.group_blocks = group_blocks;
    input.fine = fine;
    input.q = cutter.cut<T>(kPlanes * input.plane * kBlock);
    input.scales = cutter.cut<float>(kPlanes * input.plane);
    input.sums = cutter.cut<float>(rows * groups);
    return input;
}

FloatInput Form::wide(std::uint8_t* base) const {
    return {reinterpret_cast<float*>(base), m, panel};
}

BfloatInput Form::bfloat(std::uint8_t* base) const {
    return {reinterpret_cast<std::uint16_t*>(base), m, bfloat_stride(blocks)};
}

template <class T>
IntInput<T> Form::ints_from(std::uint8_t* base, std::int64_t row, std::int64_t column) const {
    const std::int64_t lane = row % panel, first = row - lane, block = column / kBlock;
    const std::int64_t at = first * blocks + block * panel + lane;
    const std::int64_t group = group_blocks ? block / group_blocks : 2 * block;
    IntInput<T> input = ints<T>(base);
    input.q += at * kBlock;
    input.scales += at;
    input.sums += first * groups + group * panel + lane;
    return input;
}

// The kernels write a panel's first rows: here the panel as seen from the row and the column on.
void Form::write(const Kernels& kernels, const Rows& x, std::uint8_t* base, std::int64_t row,
                 std::int64_t column) const {
    const std::int64_t lane = row % panel, first = row - lane;
    switch (path) {
        case Path::exact: {
            FloatInput to = wide(base);
            to.values += (first * blocks + column / kBlock * panel) * kBlock + lane;
            return kernels.write_float(x, to);
        }
        case Path::bfloat: {
            BfloatInput to = bfloat(base);
            to.values += first / kPanelRows * to.stride;
            return kernels.write_bfloat(x, to);
        }
        case Path::int8: return kernels.write_int8(x, ints_from<std::int8_t>(base, row, column));
        case Path::int16: return kernels.write_int16(x, ints_from<std::int16_t>(base, row, column));
        case Path::bounds:
            return kernels.write_bounds(x, ints_from<std::int8_t>(base, row, column));
    }
}

std::int64_t Form::claim(std::int64_t tiles, int threads) const {
    if (path != Path::bfloat) return 0;
    const std::int64_t fair = w4::ceil_div(tiles, threads * 4);  // tiles
    const std::int64_t fitting = kSumsBytes / (m * kTileRows * 4);
    return std::clamp<std::int64_t>(fitting, 2, fair + fair % 2) / 2 * 2;
}

std::int64_t Form::scratch_bytes(const TileView& w, std::int64_t claim) const {
    if (path == Path::bfloat) return line_up(bfloat_scratch_bytes(m, claim));
    if (path == Path::exact || path == Path::bounds || m < kManyRows) return 0;
    const std::int64_t codes = w.blocks * kBlock * kTileRows;  // a tile's, unpacked
    const std::int64_t params = w.groups * 2 * kTileRows * 4;  // as floats
    return line_up(codes + params);
}

void Form::multiply(const Kernels& kernels, const TileView& w, std::uint8_t* base, const Output& y,
                    std::int64_t begin, std::int64_t end, std::uint8_t* scratch) const {
    switch (path) {
        case Path::exact: return kernels.float_tiles(w, wide(base), y, begin, end);
        case Path::bfloat: return kernels.bfloat_tiles(w, bfloat(base), y, begin, end, scratch);
        case Path::int8:
            return kernels.int8_tiles(w, ints<std::int8_t>(base), y, begin, end, scratch);
        case Path::int16:
            return kernels.int16_tiles(w, ints<std::int16_t>(base), y, begin, end, scratch);
        case Path::bounds: return kernels.bound_tiles(w, ints<std::int8_t>(base), y, begin, end);
    }
}

void Form::multiply_row(const Kernels& kernels, const TileView& w, std::uint8_t* base,
                        std::int64_t row, const Output& y, std::int64_t begin,
                        std::int64_t end) const {
    IntInput<std::int16_t> x = ints_from<std::int16_t>(base, row, 0);
    x.m = 1;
    kernels.int16_tiles(w, x, y, begin, end, nullptr);
}

std::int64_t rows_within(std::int64_t bytes, std::int64_t row_bytes) {
    return std::clamp(bytes / row_bytes / kPanelRows * kPanelRows, kLeastRows, kMostRows);
}

// Every tile meets all rows of integers, which should stay in the cache.
std::int64_t rows_at_once(const TileView& w, Path path) {
    const std::int64_t bytes = w.blocks * kBlock;
    if (path == Path::int8) return rows_within(kCacheBytes, bytes);
    return path == Path::int16 ? rows_within(kCacheBytes, 2 * bytes) : kMostRows;
}

int useful_threads(const TileView& w, std::int64_t m, int threads) {
    const std::int64_t work = w.tiles * w.tile_bytes * w4::ceil_div(m, 4);
    return static_cast<int>(std::clamp<std::int64_t>(work / kThreadBytes, 1, threads));
}

// What each thread takes of its share at once, in sixteenths; the rest is claimed by halves.
//   many rows: none.
//   a few: 14. With 16 one thread waited where other programs slowed the other, with 0 AMX lost 6 %.
//   one: 16 of a short share, which ends before another claim would pay; 15 of a long one, since more
//   left to claims costs 1-2 % on a quiet machine (benchmarks/results/decoder.md).
std::int64_t first_share(std::int64_t units, std::int64_t m, std::int64_t bytes, int threads) {
    const int sixteenths = m >= kManyRows ? 0 : m > 1 ? 14 : bytes / threads < kLongShare ? 16 : 15;
    return w4::ceil_div(units * sixteenths / 16, threads);
}

Rows gather(const Rows& x, const std::int32_t* perm, void* to) {
    if (element_bytes(x.type) == 4)
        gather_as(x, perm, static_cast<std::uint32_t*>(to));
    else
        gather_as(x, perm, static_cast<std::uint16_t*>(to));
    Rows gathered = x;
    gathered.data = to;
    gathered.stride = x.k;
    return gathered;
}

}  // namespace shallow
