#include "cpu/w4_gguf.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <tuple>

#include "cpu/threads.h"

namespace shallow {
namespace {

using std::int64_t;
using std::uint16_t;
using std::uint8_t;

// What a tile keeps of 32 weights of a row.
struct Part {
    uint8_t codes[32];     // a byte each; nibbles: the first 16, columns 0..15 low and 16..31 high
    uint8_t scales[2][2];  // float16 or a byte; the second for groups of 16
    uint8_t minimum[2];    // of the same type
};

uint16_t half_at(const uint8_t* bytes) {
    uint16_t half;
    std::memcpy(&half, bytes, 2);
    return half;
}

bool finite(uint16_t half) { return (half & 0x7c00) != 0x7c00; }

// Bytes side by side in one number, for what is done to each alike and leaves its neighbours alone.
template <class Bytes = std::uint64_t>
constexpr Bytes each(uint8_t byte) {
    return static_cast<Bytes>(byte * 0x0101010101010101u);
}

template <class Bytes = std::uint64_t>
Bytes bytes_at(const uint8_t* from) {
    Bytes bytes;
    std::memcpy(&bytes, from, sizeof bytes);
    return bytes;
}

template <class Bytes>
void put(uint8_t* to, Bytes bytes) {
    std::memcpy(to, &bytes, sizeof bytes);
}

// Adds bit `i` of `bits` to code i, as its bit 4.
void add_fifth(uint8_t* codes, std::uint32_t bits) {
    for (int i = 0; i < 32; ++i) codes[i] |= static_cast<uint8_t>((bits >> i & 1) << 4);
}

void spread_nibbles(const uint8_t* pairs, uint8_t* codes) {
    for (int i = 0; i < 16; ++i) codes[i] = pairs[i] & 15, codes[i + 16] = pairs[i] >> 4;
}

// 32 codes below 16 -> 16 bytes.
void join_nibbles(const uint8_t* codes, uint8_t* pairs) {
    for (int i = 0; i < 16; i += 8)
        put(pairs + i, bytes_at(codes + i) | bytes_at(codes + i + 16) << 4);
}

// 32 codes below 64 -> 24 bytes: of each 16 the last four in the high bits of the others.
void join_sixes(const uint8_t* codes, uint8_t* bytes) {
    using Four = std::uint32_t;
    for (int half = 0; half < 2; ++half, codes += 16, bytes += 12) {
        const Four last = bytes_at<Four>(codes + 12);
        put(bytes, bytes_at<Four>(codes) | (last & each<Four>(0x30)) << 2);
        put(bytes + 4, bytes_at<Four>(codes + 4) | (last & each<Four>(0x0c)) << 4);
        put(bytes + 8, bytes_at<Four>(codes + 8) | (last & each<Four>(0x03)) << 6);
    }
}

// The 6-bit scale and minimum of part `i` of a K-quant's 12 bytes.
std::pair<uint8_t, uint8_t> sub_scale(const uint8_t* packed, int i) {
    const int j = i & 3;
    if (i < 4) return {packed[j] & 63, packed[j + 4] & 63};
    return {static_cast<uint8_t>((packed[j + 8] & 15) | packed[j] >> 6 << 4),
            static_cast<uint8_t>(packed[j + 8] >> 4 | packed[j + 4] >> 6 << 4)};
}

// Each type: its block, the spec that holds it, and its parts of 32 weights. `read` returns whether
// the block's scales are finite.
struct Q4_0 {
    static constexpr int64_t weights = 32, bytes = 18, group = 32;
    static constexpr int bits = 4;
    static constexpr auto scheme = w4::Scheme::symmetric;
    static constexpr auto scale = ScaleType::float16;
    static bool read(const uint8_t* block, int, Part& part) {
        std::memcpy(part.scales[0], block, 2);
        std::memcpy(part.codes, block + 2, 16);
        return finite(half_at(block));
    }
};

struct Iq4Nl : Q4_0 {
    static constexpr auto scheme = w4::Scheme::codebook;
};

struct Q4_1 : Q4_0 {
    static constexpr int64_t bytes = 20;
    static constexpr auto scheme = w4::Scheme::minimum;
    static bool read(const uint8_t* block, int, Part& part) {
        std::memcpy(part.scales[0], block, 2);
        std::memcpy(part.minimum, block + 2, 2);
        std::memcpy(part.codes, block + 4, 16);
        return finite(half_at(block)) && finite(half_at(block + 2));
    }
};

struct Q5_0 : Q4_0 {
    static constexpr int64_t bytes = 22;
    static constexpr int bits = 6;
    static bool read(const uint8_t* block, int, Part& part) {
        std::uint32_t high;
        std::memcpy(part.scales[0], block, 2);
        std::memcpy(&high, block + 2, 4);
        spread_nibbles(block + 6, part.codes);
        add_fifth(part.codes, high);
        for (uint8_t& code : part.codes) code = static_cast<uint8_t>(code + 32 - 16);
        return finite(half_at(block));
    }
};

struct Q5_1 : Q4_1 {
    static constexpr int64_t bytes = 24;
    static constexpr int bits = 6;
    static bool read(const uint8_t* block, int, Part& part) {
        std::uint32_t high;
        std::memcpy(part.scales[0], block, 2);
        std::memcpy(part.minimum, block + 2, 2);
        std::memcpy(&high, block + 4, 4);
        spread_nibbles(block + 8, part.codes);
        add_fifth(part.codes, high);
        return finite(half_at(block)) && finite(half_at(block + 2));
    }
};

struct Q8_0 : Q4_0 {
    static constexpr int64_t bytes = 34;
    static constexpr int bits = 8;
    static bool read(const uint8_t* block, int, Part& part) {
        std::memcpy(part.scales[0], block, 2);
        for (int i = 0; i < 32; ++i) part.codes[i] = block[2 + i] ^ 128;
        return finite(half_at(block));
    }
};

// Nibbles of a K-quant's part `i`: two parts share 32 bytes, the first the low halves.
void read_pairs(const uint8_t* low, int i, uint8_t* codes) {
    const uint8_t* const bytes = low + i / 2 * 32;
    for (int j = 0; j < 32; j += 8) put(codes + j, bytes_at(bytes + j) >> (i & 1) * 4 & each(15));
}

struct Q4_K {
    static constexpr int64_t weights = 256, bytes = 144, group = 32;
    static constexpr int bits = 4, super = 0;
    static constexpr auto scheme = w4::Scheme::kquant;
    static constexpr auto scale = ScaleType::float16;
    static bool read(const uint8_t* block, int i, Part& part) {
        uint8_t codes[32];
        std::tie(part.scales[0][0], part.minimum[0]) = sub_scale(block + 4, i);
        read_pairs(block + 16, i, codes);
        join_nibbles(codes, part.codes);
        return finite(half_at(block)) && finite(half_at(block + 2));
    }
};

struct Q5_K : Q4_K {
    static constexpr int64_t bytes = 176;
    static constexpr int bits = 6;
    static bool read(const uint8_t* block, int i, Part& part) {
        std::tie(part.scales[0][0], part.minimum[0]) = sub_scale(block + 4, i);
        read_pairs(block + 48, i, part.codes);
        for (int j = 0; j < 32; j += 8) {
            const auto fifth = (bytes_at(block + 16 + j) >> i & each(1)) << 4;
            put(part.codes + j, bytes_at(part.codes + j) | fifth);
        }
        return finite(half_at(block)) && finite(half_at(block + 2));
    }
};

struct Q6_K {
    static constexpr int64_t weights = 256, bytes = 210, group = 16;
    static constexpr int bits = 6, super = 208;
    static constexpr auto scheme = w4::Scheme::stepped;
    static constexpr auto scale = ScaleType::float16;
    static bool read(const uint8_t* block, int i, Part& part) {
        for (int half = 0; half < 2; ++half) part.scales[half][0] = block[192 + 2 * i + half];
        const int run = i / 4, quarter = i % 4;  // of 128 weights, of which two share a nibble
        const uint8_t* const low = block + run * 64 + quarter % 2 * 32;
        const uint8_t* const high = block + 128 + run * 32;
        for (int j = 0; j < 32; j += 8)
            put(part.codes + j, (bytes_at(low + j) >> quarter / 2 * 4 & each(15)) |
                                    (bytes_at(high + j) >> quarter * 2 & each(3)) << 4);
        return finite(half_at(block + 208));
    }
};

// Where a tile has what it keeps of one block of each of its rows: found once for all of them, since
// divisions took longer than what they lead to.
template <class Type>
struct Place {
    static constexpr int64_t parts = Type::weights / 32, groups = 32 / Type::group;
    uint8_t *codes[parts], *records[parts][groups];
    uint16_t* super;

    Place(const TileView& w, int64_t tile, int64_t b) {
        for (int64_t i = 0; i < parts; ++i) {
            codes[i] = const_cast<uint8_t*>(w.block(tile, b * parts + i));
            for (int64_t g = 0; g < groups; ++g)
                records[i][g] = const_cast<uint8_t*>(w.record(tile, (b * parts + i) * groups + g));
        }
        if constexpr (w4::has_supers(Type::scheme))
            super = const_cast<uint16_t*>(w.supers) +
                    (tile * w4::ceil_div(w.blocks, parts) + b) * w.super_halves;
    }
};

// A block of the tile's row `lane`; whether its scales are finite.
template <class Type>
bool copy(const Place<Type>& to, int64_t lane, const uint8_t* block) {
    constexpr int64_t element = w4::has_supers(Type::scheme) ? 1 : 2;
    bool all = true;
    for (int i = 0; i < to.parts; ++i) {
        Part part;
        all &= Type::read(block, i, part);
        uint8_t sixes[24];
        if constexpr (Type::bits == 6) join_sixes(part.codes, sixes);
        const uint8_t* const from = Type::bits == 6 ? sixes : part.codes;
        for (int j = 0; j < Type::bits; ++j)
            std::memcpy(to.codes[i] + lane * 4 + j * 64, from + j * 4, 4);
        for (int64_t g = 0; g < to.groups; ++g) {
            uint8_t* const record = to.records[i][g] + lane * element;
            std::memcpy(record, part.scales[g], element);
            if (Type::scheme == w4::Scheme::minimum || Type::scheme == w4::Scheme::kquant)
                std::memcpy(record + kTileRows * element, part.minimum, element);
        }
    }
    if constexpr (w4::has_supers(Type::scheme)) to.super[lane] = half_at(block + Type::super);
    if (Type::scheme == w4::Scheme::kquant) to.super[kTileRows + lane] = half_at(block + 2);
    return all;
}

// The matrix that holds (n, k) of a type, its arrays aside.
template <class Type>
w4::Matrix matrix_of(int64_t n, int64_t k, const float* codebook) {
    w4::Matrix kind{};
    kind.n = n;
    kind.k = k;
    kind.bits = Type::bits;
    kind.group = Type::group;
    kind.scheme = Type::scheme;
    kind.scale_type = Type::scale;
    kind.codebook = codebook;
    return kind;
}

// Whether all scales of the rows are finite. `first` is a multiple of kTileRows.
template <class Type>
bool fill(const TileView& w, const uint8_t* blocks, int64_t first, int64_t rows, int threads) {
    const int64_t row_bytes = w.k / Type::weights * Type::bytes;
    std::atomic<bool> good{true};
    parallel_for(threads, w4::ceil_div(rows, kTileRows), 4, [&](int64_t begin, int64_t end) {
        bool all = true;
        for (int64_t tile = begin; tile < end; ++tile) {
            const int64_t row = tile * kTileRows, some = std::min<int64_t>(rows - row, kTileRows);
            const uint8_t* from = blocks + row * row_bytes;
            for (int64_t b = 0; b < w.k / Type::weights; ++b, from += Type::bytes) {
                const Place<Type> to(w, first / kTileRows + tile, b);
                for (int64_t lane = 0; lane < some; ++lane)
                    all &= copy<Type>(to, lane, from + lane * row_bytes);
            }
        }
        if (!all) good = false;
    });
    return good;
}

template <class Call>
auto by_type(const std::string& type, const Call& call) {
    if (type == "Q4_0") return call(Q4_0());
    if (type == "Q4_1") return call(Q4_1());
    if (type == "IQ4_NL") return call(Iq4Nl());
    if (type == "Q5_0") return call(Q5_0());
    if (type == "Q5_1") return call(Q5_1());
    if (type == "Q8_0") return call(Q8_0());
    if (type == "Q4_K") return call(Q4_K());
    if (type == "Q5_K") return call(Q5_K());
    if (type == "Q6_K") return call(Q6_K());
    throw std::invalid_argument("no group format for GGUF type " + type);
}

}  // namespace

TiledMatrix tiles_of_gguf(const std::string& type, int64_t n, int64_t k, const float* codebook) {
    return by_type(type, [&](auto as) {
        using Type = decltype(as);
        if (n < 1 || k < 1 || k % Type::weights)
            throw std::invalid_argument("a shape that blocks do not divide");
        return TiledMatrix(matrix_of<Type>(n, k, codebook));
    });
}

bool fill_gguf(const TiledMatrix& to, const std::string& type, const uint8_t* blocks, int64_t size,
               int64_t first, int threads) {
    return by_type(type, [&](auto as) {
        using Type = decltype(as);
        const TileView& w = to.view();
        if (w.k % Type::weights || !to.of_kind(matrix_of<Type>(w.n, w.k, nullptr)))
            throw std::invalid_argument("tiles of another spec");
        const int64_t row_bytes = w.k / Type::weights * Type::bytes, rows = size / row_bytes;
        if (size < 1 || size % row_bytes) throw std::invalid_argument("blocks of another size");
        if (first < 0 || first % kTileRows || rows > w.n - first ||
            (rows % kTileRows && first + rows < w.n))
            throw std::invalid_argument("rows that are no tiles of the matrix");
        return fill<Type>(w, blocks, first, rows, threads);
    });
}

}  // namespace shallow
