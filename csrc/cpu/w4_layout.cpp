#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/threads.h"
#include "cpu/w4_matmul.h"

namespace shallow {
namespace {

using std::int64_t;
using std::uint8_t;

constexpr int64_t kChunk = 64;  // bytes

int64_t scale_bytes(const w4::Matrix& matrix) {
    if (matrix.scheme == w4::Scheme::kquant) return 1;
    return matrix.scale_type == ScaleType::float32 ? 4 : 2;
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

inline void interleave_bytes(const uint8_t* from, int64_t columns, uint8_t* block) {
    for (int64_t chunk = 0; chunk * 4 < columns; ++chunk)
        std::memcpy(block + chunk * kChunk, from + chunk * 4, 4);
}

void interleave_codes(const w4::Matrix& from, const TileView& to, uint8_t* codes, int64_t tile) {
    const int64_t rows = std::min<int64_t>(kTileRows, from.n - tile * kTileRows);
    const int64_t width = from.row_bytes();
    const uint8_t* const lines = from.codes + tile * kTileRows * width;
    uint8_t* block = codes + tile * to.blocks * to.block_bytes;
    for (int64_t b = 0; b < to.blocks; ++b, block += to.block_bytes)
        for (int64_t row = 0; row < rows; ++row) {
            if (from.bits == 4)
                interleave_nibbles(lines + row * width + b * 16, block + row * 4);
            else
                interleave_bytes(lines + row * width + b * 32,
                                 std::min<int64_t>(32, width - b * 32), block + row * 4);
        }
}

// (n, groups) elements -> their place in each record.
void interleave_params(const w4::Matrix& from, const TileView& to, const void* array,
                       int64_t element, int64_t offset, uint8_t* params, int64_t tile) {
    const int rows = static_cast<int>(std::min<int64_t>(kTileRows, from.n - tile * kTileRows));
    const auto* const source = static_cast<const uint8_t*>(array);
    const int64_t groups = from.groups();
    for (int row = 0; row < rows; ++row)
        for (int64_t g = 0; g < groups; ++g)
            std::memcpy(params + (tile * to.groups + g) * to.record_bytes + offset + row * element,
                        source + ((tile * kTileRows + row) * groups + g) * element,
                        static_cast<std::size_t>(element));
}

void interleave_supers(const w4::Matrix& from, std::uint16_t* supers, int64_t tile) {
    const int rows = static_cast<int>(std::min<int64_t>(kTileRows, from.n - tile * kTileRows));
    const int64_t count = w4::ceil_div(from.k, w4::kSuper);
    for (int row = 0; row < rows; ++row)
        for (int64_t i = 0; i < 2 * count; ++i)
            supers[(tile * 2 * count + i) * kTileRows + row] =
                from.supers[(tile * kTileRows + row) * 2 * count + i];
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
    for (int i = 0; i < 256; ++i) {  // the largest value becomes 63.75..127.5
        const double step = largest / (127.49 - i / 4.0);
        double error = 0;
        for (int j = 0; j < 16; ++j) {
            const double miss = std::nearbyint(values[j] / step) * step - values[j];
            error += miss * miss;
        }
        if (error < best) best = error, best_step = step;
    }
    return {static_cast<float>(best_step), static_cast<float>(std::sqrt(best / energy))};
}

}  // namespace

void TiledMatrix::allocate() {
    TileView& v = view_;
    const std::size_t codes = static_cast<std::size_t>(v.tiles * v.blocks * v.block_bytes);
    const std::size_t params = static_cast<std::size_t>(v.tiles * v.groups * v.record_bytes);
    const bool kquant = v.scheme == w4::Scheme::kquant;
    const std::size_t supers =
        kquant ? static_cast<std::size_t>(v.tiles * w4::ceil_div(v.k, w4::kSuper)) * 64 : 0;
    const std::size_t params_at = codes, supers_at = (params_at + params + 63) / 64 * 64;
    memory_ = Memory(supers_at + supers);
    v.codes = memory_.data();
    v.params = memory_.data() + params_at;
    v.supers = kquant ? reinterpret_cast<std::uint16_t*>(memory_.data() + supers_at) : nullptr;
}

TiledMatrix::TiledMatrix(const w4::Matrix& matrix, int threads) {
    TileView& v = view_;
    const int64_t element = scale_bytes(matrix);
    v.n = matrix.n;
    v.k = matrix.k;
    v.tiles = w4::ceil_div(v.n, kTileRows);
    v.blocks = w4::ceil_div(v.k, kBlock);
    v.group_blocks = matrix.group ? matrix.group / kBlock : v.blocks;
    v.groups = v.group_blocks ? w4::ceil_div(v.blocks, v.group_blocks) : 2 * v.blocks;
    v.kind = matrix.bits == 8 ? Codes::byte : Codes::nibble;
    v.block_bytes = matrix.bits == 8 ? 8 * kChunk : 4 * kChunk;
    v.scheme = matrix.scheme;
    v.scale_type = matrix.scale_type;
    v.center = matrix.bits == 8 ? 128.0f : 8.0f;
    v.record_bytes = kTileRows * element;
    if (v.scheme == w4::Scheme::zero) v.record_bytes += kTileRows;
    if (matrix.mins) v.record_bytes += kTileRows * element;
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
    if (matrix.perm) perm_.assign(matrix.perm, matrix.perm + matrix.k);
    allocate();

    uint8_t* const codes = memory_.data();
    uint8_t* const params = const_cast<uint8_t*>(v.params);
    parallel_for(threads, v.tiles, 4, [&](int64_t begin, int64_t end) {
        for (int64_t tile = begin; tile < end; ++tile) {
            interleave_codes(matrix, v, codes, tile);
            interleave_params(matrix, v, matrix.scales, element, 0, params, tile);
            const int64_t second = kTileRows * element;
            if (v.scheme == w4::Scheme::zero)
                interleave_params(matrix, v, matrix.zeros, 1, second, params, tile);
            if (matrix.mins)
                interleave_params(matrix, v, matrix.mins, element, second, params, tile);
            if (v.supers)
                interleave_supers(matrix, const_cast<std::uint16_t*>(v.supers), tile);
        }
    });
}

TiledMatrix::TiledMatrix(const void* weights, ScaleType type, int64_t n, int64_t k, int threads) {
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
    const int64_t element = type == ScaleType::float32 ? 4 : 2;
    v.block_bytes = kBlock * kTileRows * element;
    allocate();
    const auto* const from = static_cast<const uint8_t*>(weights);
    parallel_for(threads, v.tiles, 4, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin * kTileRows; row < std::min(n, end * kTileRows); ++row) {
            uint8_t* const tile = memory_.data() + row / kTileRows * v.blocks * v.block_bytes;
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

}  // namespace shallow
