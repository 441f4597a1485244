// 4 rows a vector of the compiler's own kind, for any processor.
#include <cmath>
#include <cstring>

#include "cpu/w4_kernel.h"

namespace shallow {
namespace {

typedef float Floats __attribute__((vector_size(16)));
typedef std::uint32_t Words __attribute__((vector_size(16)));
typedef uint8_t Bytes __attribute__((vector_size(4)));
typedef std::int8_t Steps __attribute__((vector_size(4)));

std::uint16_t to_bfloat(float v) {
    std::uint32_t bits;
    std::memcpy(&bits, &v, sizeof bits);
    if (v != v) return static_cast<std::uint16_t>(bits >> 16 | 0x40u);
    return static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

float to_float(const void* p, ScaleType type) {
    float wide;
    std::uint16_t bits;
    std::memcpy(&wide, p, type == ScaleType::float32 ? sizeof wide : sizeof bits);
    std::memcpy(&bits, p, sizeof bits);
    if (type == ScaleType::float32) return wide;
    return type == ScaleType::float16 ? w4::half_to_float(bits) : w4::bfloat_to_float(bits);
}

struct Generic {
    using F = Floats;
    static constexpr int lanes = 4, max_rows = 4;
    static constexpr bool unpacks = false, keeps_codes = true, keeps_supers = false, words = false;
    template <Codes C>
    static constexpr int most_rows = max_rows;

    static F set(float v) { return F{} + v; }
    static F add(F a, F b) { return a + b; }
    static F mul(F a, F b) { return a * b; }
    static F fma(F a, F b, F c) { return a * b + c; }

    static F load_bytes(const void* p) {
        Bytes bytes;
        std::memcpy(&bytes, p, sizeof bytes);
        return __builtin_convertvector(bytes, F);
    }
    static F load_steps(const void* p) {
        Steps bytes;
        std::memcpy(&bytes, p, sizeof bytes);
        return __builtin_convertvector(bytes, F);
    }
    static F load(const void* p, ScaleType type) {
        const int size = element_bytes(type);
        F v{};
        for (int i = 0; i < lanes; ++i)
            v[i] = to_float(static_cast<const uint8_t*>(p) + i * size, type);
        return v;
    }
    static F load_half(const void* p) { return load(p, ScaleType::float16); }
    static void load_pairs(const void* p, F& even, F& odd) {  // 4 rows x 2 columns of bfloat16
        Words words;
        std::memcpy(&words, p, sizeof words);
        const Words high = words << 16, low = words & 0xffff0000u;
        std::memcpy(&even, &high, sizeof even);
        std::memcpy(&odd, &low, sizeof odd);
    }
    static F load_some(const float* p, int count) {
        F v{};
        std::memcpy(&v, p, static_cast<std::size_t>(count) * sizeof(float));
        return v;
    }
    static void store_all(float* p, F v) { std::memcpy(p, &v, sizeof v); }
    static void store(void* p, ScaleType type, F v, int count) {
        if (type == ScaleType::float32) {
            std::memcpy(p, &v, static_cast<std::size_t>(count) * sizeof(float));
            return;
        }
        std::uint16_t bits[lanes];
        for (int i = 0; i < count; ++i)
            bits[i] = type == ScaleType::float16 ? w4::float_to_half(v[i]) : to_bfloat(v[i]);
        std::memcpy(p, bits, static_cast<std::size_t>(count) * sizeof bits[0]);
    }

    static Words chunk_words(const uint8_t* block, int j) {
        Words words;
        std::memcpy(&words, block + 64 * j, sizeof words);
        return words;
    }
    template <Codes C>
    static Words chunk(const uint8_t* block, int j) {
        if (C == Codes::byte) return chunk_words(block, j);
        if (C != Codes::six) return chunk_words(block, j % 4) >> (j / 4 * 4);
        const uint8_t* const half = block + j / 4 * 192;
        if (j % 4 < 3) return chunk_words(half, j % 4) & 0x3f3f3f3fu;
        return (chunk_words(half, 0) >> 2 & 0x30303030u) |
               (chunk_words(half, 1) >> 4 & 0x0c0c0c0cu) |
               (chunk_words(half, 2) >> 6 & 0x03030303u);
    }
    template <Codes C>
    static F code(const TileView& w, Words chunk, int byte) {
        const Words codes =
            chunk >> (8 * byte) & (C == Codes::byte || C == Codes::six ? 255u : 15u);
        if (C != Codes::nibble_table) return __builtin_convertvector(codes, F);
        F v{};
        for (int i = 0; i < lanes; ++i) v[i] = w.values[codes[i]];
        return v;
    }

    // In float32: products and sums of a block stay below 2^24, so they are exact.
    template <int Halves>
    struct Columns {
        F column[16 * Halves];
    };

    template <Codes C, int First, int Last, int R>
    static Columns<Last - First> codes(const TileView& w, const uint8_t* block) {
        Columns<Last - First> out;
        for (int k = 16 * First; k < 16 * Last; ++k) {
            const Words words = chunk<C>(block, k / 4);
            F& column = out.column[k - 16 * First];
            if (C == Codes::nibble_table)
                for (int i = 0; i < lanes; ++i)
                    column[i] = w.values8[words[i] >> (8 * (k % 4)) & 15u];
            else
                column = code<C>(w, words, k % 4);
        }
        return out;
    }

    template <int Halves>
    static F dot(const Columns<Halves>& codes, const int8_t* q) {
        F sum{};
        for (int k = 0; k < 16 * Halves; ++k) sum += codes.column[k] * static_cast<float>(q[k]);
        return sum;
    }

    static void widen(const void* from, ScaleType type, float* to, int count) {
        const int size = element_bytes(type);
        for (int j = 0; j < kBlock; ++j)
            to[j] = j < count ? to_float(static_cast<const uint8_t*>(from) + j * size, type) : 0.0f;
    }

    static float quantize(const float* x, int8_t* q, std::int32_t* sums) {
        // As integers, so that NaN counts as larger than infinity and spoils the scale.
        std::uint32_t largest = 0;
        for (int j = 0; j < kBlock; ++j) {
            std::uint32_t bits;
            std::memcpy(&bits, x + j, sizeof bits);
            bits &= 0x7fffffffu;
            if (bits > largest) largest = bits;
        }
        float peak;
        std::memcpy(&peak, &largest, sizeof peak);
        const bool bad = !(peak <= 3.4e38f), tiny = peak < kTiny;
        const float inverse = bad || tiny ? 0.0f : 127.0f / peak;
        sums[0] = sums[1] = 0;
        for (int j = 0; j < kBlock; ++j) {
            // a non-finite value would have no integer: the scale alone carries it
            const int rounded = bad ? -128 : static_cast<int>(std::nearbyint(x[j] * inverse));
            q[j] = static_cast<int8_t>(rounded);
            sums[j / 16] += rounded;
        }
        return tiny ? 0.0f : peak / 127.0f;
    }
};

}  // namespace

const Kernels kKernelsGeneric = make_kernels<Generic>();

}  // namespace shallow
