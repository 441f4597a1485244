// A tile of W as the kernels of one instruction set walk it, and where its products go, in terms of
// the vector type V of w4_kernel.h.
#pragma once

#include <cstring>
#include <type_traits>

#include "cpu/w4_input.h"

namespace shallow {
namespace {

// Bytes of weights prefetched, into L1 but for kNear: from memory 3-6 % faster than into L2. With
// 8 KiB instead of 2 a model in L3 decodes at 493 tok/s instead of 464; from memory 8 rows are 5 %
// faster, but one row 4-8 % slower, so that its long streams take less: bytes_ahead()
// (benchmarks/results/decoder.md).
constexpr int64_t kAhead = 8192, kAheadOfPlain = 2048;
constexpr int64_t kLong = 512 << 10;  // bytes of a stream
// Where codes pass by (AVX2) they are fetched into L2 first, and from so near into L1: from memory
// 12 % faster than into L1 at once, from L2 and L3 7-9 %; but see fetches_twice().
constexpr int64_t kNear = 1024;

template <class V>
constexpr int kParts = kTileRows / V::lanes;  // vectors a tile's 16 rows take

// Of a block of codes.
template <Codes C>
constexpr int kBlockBytes = C == Codes::byte || C == Codes::unpacked || C == Codes::high ? 512
                            : C == Codes::six                                            ? 384
                                                                                         : 256;

// What a kernel knows of a group's parameters before it meets them: to ask their kind of every group
// took a lone row up to a tenth of its time. half: float16 scales alone; half_minimum: and minimums.
enum class Params { any, half, half_minimum, kquant, stepped };

inline Params params_of(const TileView& w) {
    if (w.scheme == w4::Scheme::kquant) return Params::kquant;
    if (w.scheme == w4::Scheme::stepped) return Params::stepped;
    if (w.scale_type != ScaleType::float16) return Params::any;
    if (w.scheme == w4::Scheme::minimum) return Params::half_minimum;
    return w.scheme == w4::Scheme::symmetric || w.scheme == w4::Scheme::codebook ? Params::half
                                                                                 : Params::any;
}

// Is a minimum the same multiple of each scale?
template <Params P>
constexpr bool minimum_of_scale = P == Params::half || P == Params::stepped;

// call() with that kind as a constant, if codes have it; Split: group 16.
template <Codes C, bool Split, class Call>
SHALLOW_INLINE void by_params(Params kind, const Call& call) {
    if constexpr (C == Codes::high) return call(std::integral_constant<Params, Params::any>());
    constexpr bool kSupers = C == Codes::six || (C == Codes::nibble && !Split);
    constexpr Params kSuper = Split ? Params::stepped : Params::kquant;
    if (kind == Params::half) return call(std::integral_constant<Params, Params::half>());
    if (kind == Params::half_minimum)
        return call(std::integral_constant<Params, Params::half_minimum>());
    if constexpr (kSupers)
        if (kind == kSuper) return call(std::integral_constant<Params, kSuper>());
    call(std::integral_constant<Params, Params::any>());
}

// A K-quant's d and -dmin for the tile's rows from `lane` on, and under them a group's scale and min.
template <class V>
SHALLOW_INLINE void load_super(const std::uint16_t* super, int lane, typename V::F& d,
                               typename V::F& dmin) {
    d = V::load_half(super + lane);
    dmin = V::mul(V::load_half(super + kTileRows + lane), V::set(-1.0f));
}
template <class V>
SHALLOW_INLINE void load_under(const uint8_t* record, int lane, typename V::F d, typename V::F dmin,
                               typename V::F& scale, typename V::F& min) {
    scale = V::mul(d, V::load_bytes(record + lane));
    min = V::mul(dmin, V::load_bytes(record + kTileRows + lane));
}

// The group's scale and min for the tile's rows from `lane` on: value = scale * code + min.
template <class V, Codes C, Params P>
SHALLOW_INLINE void load_params(const TileView& w, const uint8_t* record,
                                const std::uint16_t* super, int lane, typename V::F& scale,
                                typename V::F& min) {
    using w4::Scheme;
    if constexpr (C == Codes::unpacked) {
        scale = V::load(record + lane * 4, ScaleType::float32);
        min = V::load(record + 64 + lane * 4, ScaleType::float32);
        return;
    }
    if constexpr (C == Codes::high) {
        // What a negative scale makes of a bound is none: NaN.
        min =
            V::unless_negative(V::load(record + lane * element_bytes(w.scale_type), w.scale_type));
        scale = V::mul(min, V::set(2.0f));
        return;
    }
    if (P == Params::kquant || (P == Params::any && w.scheme == Scheme::kquant)) {
        typename V::F d, dmin;
        load_super<V>(super, lane, d, dmin);
        return load_under<V>(record, lane, d, dmin, scale, min);
    }
    if (P == Params::stepped || (P == Params::any && w.scheme == Scheme::stepped)) {
        scale = V::mul(V::load_half(super + lane), V::load_steps(record + lane));
        min = V::mul(scale, V::set(-w.center));
        return;
    }
    if constexpr (P != Params::any) {
        scale = V::load_half(record + lane * 2);
        if constexpr (P == Params::half_minimum)
            min = V::load_half(record + 32 + lane * 2);
        else
            min = C == Codes::nibble_table ? V::set(0.0f) : V::mul(scale, V::set(-w.center));
        return;
    }
    const int size = element_bytes(w.scale_type);
    const uint8_t* const second = record + 16 * size;
    scale = V::load(record + lane * size, w.scale_type);
    if (w.scheme == Scheme::minimum)
        min = V::load(second + lane * size, w.scale_type);
    else if (w.scheme == Scheme::zero)
        min = V::mul(V::mul(V::load_bytes(second + lane), scale), V::set(-1.0f));
    else if (C == Codes::nibble_table)
        min = V::set(0.0f);
    else
        min = V::mul(scale, V::set(-w.center));
}

// A tile so many behind that of a stream.
struct Behind {
    int64_t tiles = 0, bytes = 0;
};

// What a K-quant's groups have in common.
template <class V>
struct Kept {
    typename V::F d[kParts<V>], dmin[kParts<V>];
};

// Walks one tile, or the rest of it from a block on, and others behind it in step: the parameters of
// each group in which a block lies, then its blocks.
template <class V, Codes C>
class Stream {
public:
    SHALLOW_INLINE Stream(const TileView& view, int64_t tile, int64_t first = 0,
                          int64_t bytes_ahead = kAhead)
        : w_(view), ahead_(bytes_ahead),
          group_(w_.group_blocks ? first / w_.group_blocks : 2 * first),
          next_(w_.record(tile, group_)), at_(w_.block(tile, first)),
          super_(w_.supers ? w_.supers + tile * supers() : nullptr) {
        // Of the blocks of a run's first group only the first has the run's records before it.
        const bool begins = first % w_.run_blocks == 0;
        left_ = begins ? 0 : w_.run_groups - group_ % w_.run_groups;
        if (begins) at_ = next_;
    }

    // The next group. Does a run begin with it?
    SHALLOW_INLINE bool enter() {
        const bool begins = left_ == 0;
        if (begins) {
            next_ = at_;
            at_ += w_.head_bytes;
            left_ = w_.run_groups;
        }
        record_ = next_;
        next_ += w_.record_bytes;
        ++group_;
        --left_;
        return begins;
    }
    // What follows the run that begins.
    SHALLOW_INLINE void fetch_head(Behind by = {}) const {
        if constexpr (C != Codes::unpacked) __builtin_prefetch(record_ + by.bytes + ahead_, 0, 2);
    }
    // The group's parameters.
    template <Params P = Params::any>
    SHALLOW_INLINE void params(typename V::F* scale, typename V::F* min, Behind by = {}) const {
        const std::uint16_t* super = nullptr;
        if constexpr (P == Params::kquant)
            super = kquant_super(by);
        else if constexpr (P == Params::stepped)
            super = super_ + by.tiles * supers() + (group_ - 1) / 16 * 16;
        else if (P == Params::any && w_.supers)
            super = super_ + by.tiles * supers() + (group_ - 1) / w_.super_groups * w_.super_halves;
        for (int p = 0; p < kParts<V>; ++p)
            load_params<V, C, P>(w_, record_ + by.bytes, super, p * V::lanes, scale[p], min[p]);
    }
    // The same of a K-quant whose d and -dmin are kept for the eight groups that they are of.
    SHALLOW_INLINE void params_kept(Kept<V>& kept, typename V::F* scale, typename V::F* min,
                                    Behind by) const {
        for (int p = 0; p < kParts<V>; ++p) {
            const int lane = p * V::lanes;
            if ((group_ - 1) % 8 == 0)
                load_super<V>(kquant_super(by), lane, kept.d[p], kept.dmin[p]);
            load_under<V>(record_ + by.bytes, lane, kept.d[p], kept.dmin[p], scale[p], min[p]);
        }
    }
    // For int8 products, where a codebook is a table of bytes around 128.
    template <Params P = Params::any>
    SHALLOW_INLINE void params8(typename V::F* scale, typename V::F* min, Behind by = {}) const {
        params<P>(scale, min, by);
        if (C != Codes::nibble_table) return;
        for (int p = 0; p < kParts<V>; ++p) {
            scale[p] = V::mul(scale[p], V::set(w_.values8_step));
            min[p] = V::mul(scale[p], V::set(-128.0f));
        }
    }
    SHALLOW_INLINE void next(typename V::F* scale, typename V::F* min) {
        if (enter()) fetch_head();
        params(scale, min);
    }
    template <Params P = Params::any>
    SHALLOW_INLINE void next8(typename V::F* scale, typename V::F* min) {
        if (enter()) fetch_head();
        params8<P>(scale, min);
    }
    SHALLOW_INLINE const uint8_t* block() {
        const uint8_t* const here = at_;
        at_ += kBlockBytes<C>;
        return here;
    }

private:
    const TileView& w_;
    const int64_t ahead_;
    int64_t group_, left_;  // the next, and how many of its run
    const uint8_t *next_, *at_, *record_ = nullptr;
    const std::uint16_t* super_;

    SHALLOW_INLINE const std::uint16_t* kquant_super(Behind by) const {
        return super_ + by.tiles * supers() + (group_ - 1) / 8 * 2 * kTileRows;
    }
    SHALLOW_INLINE int64_t supers() const {  // of a tile
        return (w_.blocks + 7) / 8 * w_.super_halves;
    }
};

// Asks for the lines of codes that follow the block's so many bytes on: into L1, or, twice, into L2
// and those that are near into L1.
template <Codes C>
SHALLOW_INLINE void fetch_codes(const uint8_t* block, int64_t ahead, bool twice) {
    if (twice) {
#pragma GCC unroll 8
        for (int line = 0; line < kBlockBytes<C>; line += 64) {
            __builtin_prefetch(block + ahead + line, 0, 2);
            __builtin_prefetch(block + kNear + line, 0, 3);
        }
    } else {
#pragma GCC unroll 8
        for (int line = 0; line < kBlockBytes<C>; line += 64)
            __builtin_prefetch(block + ahead + line, 0, 3);
    }
}

// Are these numbers, none of which is negative, all zero? Their bits tell: compared one by one they
// took a tenth of the time of the products.
template <int R>
SHALLOW_INLINE bool all_zero(const float* numbers) {
    std::uint64_t bits[(R + 1) / 2] = {};
    std::memcpy(bits, numbers, R * sizeof *numbers);
    std::uint64_t any = 0;
    for (const std::uint64_t some : bits) any |= some;
    return any == 0;
}

// Where R rows of x meet one tile of W.
struct Place {
    int64_t tile;            // of the view
    int64_t panel, first;    // rows of x: first.. of the panel
    int64_t column, n;       // of y, and how many columns y has
    int streams = 1;         // tiles that are met in turn, some blocks of each,
    int64_t apart = 0;       // each so many behind the one before
    int64_t ahead = kAhead;  // bytes, of fetch_codes()
    bool twice = false;
    int64_t together = 1;  // tiles one after the other

    Place of_stream(int i) const {
        Place there = *this;
        there.tile += i * apart;
        there.column += i * apart * kTileRows;
        return there;
    }
};

// Fetches where write() will write: the lines of a prefill's outputs have left every cache, and each
// is waited for (512 rows of 576 columns on AVX2: a tenth of the time).
SHALLOW_INLINE void fetch(const Output& y, const Place& at, int rows) {
    const int64_t size = element_bytes(y.type);
    const int64_t row = at.panel * kPanelRows + at.first;
    for (int stream = 0; stream < at.streams; ++stream) {
        const int64_t column = at.of_stream(stream).column;
        for (int i = 0; i < rows; ++i)
            __builtin_prefetch(
                static_cast<uint8_t*>(y.data) + ((row + i) * y.stride + column) * size, 1, 3);
    }
}

// sums: (rows, 16), for the place's rows of x and the tile's rows of W.
template <class V>
__attribute__((noinline)) void write(const float* sums, int rows, const Output& y,
                                     const Place& at) {
    const int64_t size = element_bytes(y.type);
    const int64_t begin = (at.panel * kPanelRows + at.first) * y.stride + at.column;
    uint8_t* to = static_cast<uint8_t*>(y.data) + begin * size;
    if (size == 4 && !y.bias && at.column + kTileRows <= at.n) {  // nearly always
        for (int i = 0; i < rows; ++i, sums += kTileRows, to += y.stride * size)
            std::memcpy(to, sums, kTileRows * sizeof *sums);
        return;
    }
    for (int lane = 0; lane < kTileRows && at.column + lane < at.n; lane += V::lanes) {
        const int64_t column = at.column + lane, left = at.n - column;
        const int count = static_cast<int>(left < V::lanes ? left : V::lanes);
        const auto bias = y.bias ? V::load_some(y.bias + column, count) : V::set(0.0f);
        for (int i = 0; i < rows; ++i) {
            const auto sum = V::load(sums + i * kTileRows + lane, ScaleType::float32);
            V::store(to + (i * y.stride + lane) * size, y.type, V::add(sum, bias), count);
        }
    }
}

// sums: (rows, 16). tops: the largest of each row's, NaN where one is.
template <class V>
SHALLOW_INLINE void write_tops(float* sums, int rows, const Output& tops, const Place& at) {
    float* to =
        static_cast<float*>(tops.data) + (at.panel * kPanelRows + at.first) * tops.stride + at.tile;
    for (int i = 0; i < rows; ++i, sums += kTileRows, to += tops.stride) {
        auto top = V::load(sums, ScaleType::float32);
        for (int p = 1; p < kParts<V>; ++p)
            top = V::largest(top, V::load(sums + p * V::lanes, ScaleType::float32));
        *to = V::horizontal_largest(top);
    }
}

}  // namespace
}  // namespace shallow
