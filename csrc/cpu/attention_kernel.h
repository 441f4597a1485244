// Attention over pages, once; attention_<isa>.cpp include it after their lanes. Everything is local
// to the including file.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "cpu/attention.h"
#include "cpu/attention_ahead.h"
#include "cpu/features.h"
#include "cpu/functions.h"

namespace shallow {
namespace {

using std::int8_t;
using std::uint8_t;

constexpr int kRowGroup = 6;  // rows that meet a key or value while it is in registers
// Of fewer than these, four vectors of keys or values meet all in registers at once: of three rows
// twelve sums, which two units that take four cycles each need eight of to be busy.
constexpr int kNarrow = 4;
constexpr int64_t kPageStripes = kPage / kStripe;

// One kv head of one page.
template <class T>
struct Head {
    const T *keys, *values;
    const float *key_scales, *value_scales;  // int8 only

    Head(const KvShape& shape, const uint8_t* page, int64_t head) {
        const uint8_t* const at = page + head * shape.head_bytes;
        keys = reinterpret_cast<const T*>(at);
        values = reinterpret_cast<const T*>(at + shape.key_bytes);
        key_scales = reinterpret_cast<const float*>(at + shape.key_bytes + shape.value_bytes);
        value_scales = key_scales + kPage;
    }
};

// The positions of `span` in its first page.
template <class T>
Ahead first_page(const KvShape& shape, const Span& span, int64_t near) {
    const Head<T> page(shape, span.pages[span.begin / kPage], span.head);
    const int64_t positions = std::min(kPage, span.end - span.begin);
    const int64_t stripes = (positions - 1) / kStripe + 1, size = sizeof(T);
    Ahead ahead(near);
    if (stripes == kPageStripes) {
        ahead.add(page.keys, shape.head_bytes, Ahead::kStreams);
    } else {
        ahead.add(page.keys, stripes * kStripe * shape.head_dim * size, Ahead::kStreams / 2);
        ahead.add(page.values, positions * shape.width * size, Ahead::kStreams / 2);
    }
    return ahead;
}

// total (R, V) += row (R,) * vector (V,); the fewer of the two are held, the others pass by.
template <int R, int V, class Row, class Vector>
inline __attribute__((always_inline)) void add_products(F (&total)[R][V], const Row& row,
                                                        const Vector& vector) {
    F held[std::min(R, V)];
    if constexpr (R < V) {
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) held[r] = row(r);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            const F some = vector(v);
#pragma GCC unroll 6
            for (int r = 0; r < R; ++r) total[r][v] = Lanes::fma(held[r], some, total[r][v]);
        }
    } else {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) held[v] = vector(v);
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
            const F some = row(r);
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) total[r][v] = Lanes::fma(some, held[v], total[r][v]);
        }
    }
}

// scores (R, kPage) of V vectors of keys from position p on, which is a multiple of them.
template <class T, int R, int V>
inline void score_part(const T* keys, int64_t head_dim, const float* const* rows, int64_t p,
                       Ahead* ahead, float* scores) {
    constexpr int kVectors = kStripe / Lanes::count;  // of a stripe
    constexpr int kStripes = (V - 1) / kVectors + 1;
    constexpr int64_t kBytes = V * Lanes::count * sizeof(T);  // that one pass reads
    const T* key = keys + p / kStripe * kStripe * head_dim + p % kStripe;
    F total[R][V];
    for (auto& row : total)
        for (F& vector : row) vector = Lanes::set(0);
    fetching<kBytes>(ahead, head_dim, [&](int64_t e) {
        for (int i = 0; i < kStripes; ++i)
            fetch_near(ahead, key + i * kStripe * head_dim, kStripe * sizeof(T));
        add_products<R, V>(
            total, [&](int r) { return Lanes::set(rows[r][e]); },
            [&](int v) {
                const int64_t stripe = v / kVectors * kStripe * head_dim;
                return Lanes::load(key + stripe + v % kVectors * Lanes::count);
            });
        key += kStripe;
    });
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v)
            Lanes::store(scores + r * kPage + p + v * Lanes::count, total[r][v]);
}

// scores (R, kPage) of the first `positions` keys, rounded up to two vectors. ahead: what to fetch
// while each stripe is read.
template <class T, int R>
void score(const T* keys, int64_t head_dim, const float* const* rows, int64_t positions,
           Ahead* ahead, float* scores) {
    constexpr int64_t kTwo = 2 * Lanes::count;
    static_assert(kStripe % kTwo == 0, "two vectors lie in one stripe");
    // Two stripes at once are two streams, which fewer rows would wait for.
    constexpr bool kFour = R < kNarrow && (2 * kTwo <= kStripe || R == kNarrow - 1);
    int64_t p = 0;
    if constexpr (kFour)
        for (; p + kTwo < positions; p += 2 * kTwo)
            score_part<T, R, 4>(keys, head_dim, rows, p, ahead, scores);
    for (; p < positions; p += kTwo) score_part<T, R, 2>(keys, head_dim, rows, p, ahead, scores);
}

// sums (R, width) = factors * sums + shares (R, kPage) @ values, features from.. of W vectors.
template <class T, int R, int W>
inline void weigh_part(const T* values, int64_t width, int64_t positions, const float* shares,
                       const float* factors, Ahead* ahead, int64_t from, float* sums) {
    constexpr int64_t kBytes = W * Lanes::count * sizeof(T);
    values += from;
    sums += from;
    F total[R][W];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int w = 0; w < W; ++w)
            total[r][w] = Lanes::mul(Lanes::load(sums + r * width + w * Lanes::count),
                                     Lanes::set(factors[r]));
    fetching<kBytes>(ahead, positions, [&](int64_t p) {
        fetch_near(ahead, values, kBytes);
        add_products<R, W>(
            total, [&](int r) { return Lanes::set(shares[r * kPage + p]); },
            [&](int w) { return Lanes::load(values + w * Lanes::count); });
        values += width;
    });
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int w = 0; w < W; ++w) Lanes::store(sums + r * width + w * Lanes::count, total[r][w]);
}

template <class T, int R>
void weigh(const T* values, int64_t width, int64_t positions, const float* shares,
           const float* factors, Ahead* ahead, float* sums) {
    constexpr int kMost = R < kNarrow ? std::max(Lanes::wide, 4) : Lanes::wide;
    int64_t from = 0;
    const auto columns = [&](auto vectors) {
        for (constexpr int64_t some = vectors() * Lanes::count; from + some <= width; from += some)
            weigh_part<T, R, vectors()>(values, width, positions, shares, factors, ahead, from,
                                        sums);
    };
    columns(std::integral_constant<int, kMost>());
    columns(std::integral_constant<int, 2>());
    columns(std::integral_constant<int, 1>());
}

// call(std::integral_constant<int, R>, first row) for groups of R rows, R at most kRowGroup.
template <class Call>
inline void in_groups(int64_t rows, const Call& call) {
    int64_t row = 0;
    for (; rows - row >= kRowGroup; row += kRowGroup)
        call(std::integral_constant<int, kRowGroup>(), row);
    switch (rows - row) {
        case 1: return call(std::integral_constant<int, 1>(), row);
        case 2: return call(std::integral_constant<int, 2>(), row);
        case 3: return call(std::integral_constant<int, 3>(), row);
        case 4: return call(std::integral_constant<int, 4>(), row);
        case 5: return call(std::integral_constant<int, 5>(), row);
        default: return;
    }
}

struct Softmax {
    float peak = -INFINITY, total = 0;
    float latest = 0;  // of total, what the last page gave
};

// Of R rows from `row` on: the positions lo..hi-1 of a page at `at` that each of them sees, none
// where lo == hi, and the whole vectors begin..end-1 that hold them all.
template <int R>
struct Seen {
    int64_t lo[R], hi[R], begin = 0, end = 0;

    Seen(const Queries& queries, int64_t row, int64_t at, int64_t positions) {
        int64_t first = positions, last = 0;
        for (int r = 0; r < R; ++r) {
            const int64_t position = queries.position + (row + r) / queries.heads;
            lo[r] = queries.window ? std::max<int64_t>(position + 1 - queries.window - at, 0) : 0;
            hi[r] = std::min(position + 1 - at, positions);
            if (row + r >= queries.count * queries.heads || hi[r] <= lo[r]) lo[r] = hi[r] = 0;
            if (!any(r)) continue;
            first = std::min(first, lo[r]);
            last = std::max(last, hi[r]);
        }
        if (last == 0) return;
        begin = first / Lanes::count * Lanes::count;
        end = (last + Lanes::count - 1) / Lanes::count * Lanes::count;
    }
    bool any(int r) const { return lo[r] < hi[r]; }
};

// What scores are multiplied by, and capped at.
struct Scaling {
    const float* rows;       // (R,)
    const float* positions;  // (kPage,), or null: 1
    float softcap;           // 0: none
};

// scores (R, kPage) of R rows in a page -> shares under each row's new peak, weighed by `weights`
// (kPage,) unless null, zeros up to `end` where a row sees nothing. factors (R,): what earlier
// sums are to be multiplied by. The rows go side by side: one at a time, every sum and peak waited
// for the one before it, and they took a third of attention instead of a fifth.
template <int R>
void update(const Seen<R>& seen, const Scaling& scaling, const float* weights, int64_t end,
            Softmax* softmax, float* scores, float* factors) {
    for (int64_t p = seen.begin; p < seen.end; p += Lanes::count)
        for (int r = 0; r < R; ++r) {
            float* const at = scores + r * kPage + p;
            F v = Lanes::mul(Lanes::load(at), Lanes::set(scaling.rows[r]));
            if (scaling.positions) v = Lanes::mul(v, Lanes::load(scaling.positions + p));
            if (scaling.softcap != 0)
                v = Lanes::mul(
                    hyperbolic_tangent(Lanes::mul(v, Lanes::set(1.0f / scaling.softcap))),
                    Lanes::set(scaling.softcap));
            Lanes::store(at, v);
        }
    F peaks[R], sums[R];
    for (int r = 0; r < R; ++r) {
        float* const at = scores + r * kPage;
        std::fill(at + seen.begin, at + std::max(seen.lo[r], seen.begin), -INFINITY);
        std::fill(at + std::max(seen.hi[r], seen.begin), at + seen.end, -INFINITY);
        peaks[r] = Lanes::set(softmax[r].peak);
        sums[r] = Lanes::set(0);
    }
    for (int64_t p = seen.begin; p < seen.end; p += Lanes::count)
        for (int r = 0; r < R; ++r)
            peaks[r] = Lanes::max(peaks[r], Lanes::load(scores + r * kPage + p));
    for (int r = 0; r < R; ++r) {
        const float peak = seen.any(r) ? Lanes::peak(peaks[r]) : 0;
        factors[r] = seen.any(r) ? std::exp(softmax[r].peak - peak) : 1;
        if (seen.any(r)) softmax[r].peak = peak;
        peaks[r] = Lanes::set(peak);
    }
    for (int64_t p = seen.begin; p < seen.end; p += Lanes::count) {
        const F weight = weights ? Lanes::load(weights + p) : Lanes::set(1);
        for (int r = 0; r < R; ++r) {
            float* const at = scores + r * kPage + p;
            const F share = exponential(Lanes::sub(Lanes::load(at), peaks[r]));
            sums[r] = Lanes::add(sums[r], share);  // hidden positions add 1e-38
            Lanes::store(at, weights ? Lanes::mul(share, weight) : share);
        }
    }
    for (int r = 0; r < R; ++r) {
        softmax[r].latest = seen.any(r) ? Lanes::sum(sums[r]) : 0;
        softmax[r].total = softmax[r].total * factors[r] + softmax[r].latest;
        float* const at = scores + r * kPage;
        std::fill(at, at + seen.lo[r], 0.0f);
        std::fill(at + seen.hi[r], at + std::max(end, seen.end), 0.0f);
    }
}

// The same for scores of queries and keys as they are, from row `row` on.
template <class T, int R>
void update(const Queries& queries, int64_t row, int64_t at, int64_t positions, int64_t end,
            const Head<T>& page, Softmax* softmax, float* scores, float* factors) {
    constexpr bool kScaled = std::is_same_v<T, int8_t>;
    float scales[R];
    std::fill(scales, scales + R, queries.scale);
    const Scaling scaling{scales, kScaled ? page.key_scales : nullptr, queries.softcap};
    update(Seen<R>(queries, row, at, positions), scaling, kScaled ? page.value_scales : nullptr,
           end, softmax + row, scores + row * kPage, factors + row);
}

// sums (rows, width) -> the outcome.
inline void write(const KvShape& shape, const Queries& queries, const Softmax* softmax,
                  const float* sums, const Attended& to) {
    for (int64_t r = 0; r < queries.count * queries.heads; ++r) {
        float* const out =
            to.data + r / queries.heads * to.stride + r % queries.heads * shape.head_dim;
        const float factor = to.peaks ? 1.0f : 1.0f / softmax[r].total;
        for (int64_t e = 0; e < shape.head_dim; ++e) out[e] = sums[r * shape.width + e] * factor;
        if (!to.peaks) continue;
        to.peaks[r] = softmax[r].peak;
        to.totals[r] = softmax[r].total;
    }
}

template <class T>
void attend_to(const KvShape& shape, const Span& span, const Span& next, const Queries& queries,
               const Attended& to, float* scratch) {
    const int64_t rows = queries.count * queries.heads, width = shape.width;
    float* const scores = scratch;               // (rows, kPage)
    float* const sums = scores + rows * kPage;   // (rows, width)
    float* const factors = sums + rows * width;  // (rows,)
    auto* const softmax = reinterpret_cast<Softmax*>(factors + rows);
    std::fill(sums, sums + rows * width, 0.0f);
    for (int64_t r = 0; r < rows; ++r) softmax[r] = Softmax();
    for (int64_t at = span.begin; at < span.end; at += kPage) {
        const Head<T> page(shape, span.pages[at / kPage], span.head);
        const int64_t positions = std::min(kPage, span.end - at);
        const Span here{span.pages, span.head, at, span.end};
        const Span rest{span.pages, span.head, at + kPage, span.end};
        const Span& following = rest.begin < rest.end ? rest : next;
        Ahead ahead = first_page<T>(shape, following.begin < following.end ? following : here,
                                    page_bytes_ahead(positions, kPage));
        in_groups(rows, [&](auto group, int64_t row) {
            const float* some[group()];
            for (int r = 0; r < group(); ++r) some[r] = queries.row(row + r, shape.head_dim);
            score<T, group()>(page.keys, shape.head_dim, some, positions, row ? nullptr : &ahead,
                              scores + row * kPage);
        });
        in_groups(rows, [&](auto group, int64_t row) {
            update<T, group()>(queries, row, at, positions, positions, page, softmax, scores,
                               factors);
        });
        in_groups(rows, [&](auto group, int64_t row) {
            weigh<T, group()>(page.values, width, positions, scores + row * kPage, factors + row,
                              row ? nullptr : &ahead, sums + row * width);
        });
        while (ahead.fetch_next()) continue;  // a shorter page leaves some
    }
    write(shape, queries, softmax, sums, to);
}

void attend(const KvShape& shape, const Span& span, const Span& next, const Queries& queries,
            const Attended& to, float* scratch) {
    switch (shape.type) {
        case KvType::float32: return attend_to<float>(shape, span, next, queries, to, scratch);
        case KvType::float16:
            return attend_to<std::uint16_t>(shape, span, next, queries, to, scratch);
        case KvType::int8: return attend_to<int8_t>(shape, span, next, queries, to, scratch);
    }
}

template <class T>
void fetch_as(const KvShape& shape, const Span& span) {
    Ahead ahead = first_page<T>(shape, span, 0);
    while (ahead.fetch_next()) continue;
}

void fetch(const KvShape& shape, const Span& span) {
    switch (shape.type) {
        case KvType::float32: return fetch_as<float>(shape, span);
        case KvType::float16: return fetch_as<std::uint16_t>(shape, span);
        case KvType::int8: return fetch_as<int8_t>(shape, span);
    }
}

void combine(const float* data, const float* peaks, const float* totals, int64_t heads,
             int64_t spans, int64_t head_dim, float* shares, float* out) {
    const int64_t width = heads * head_dim;
    each_vector(heads, [&](int64_t h, int64_t some) {
        F peak = load(peaks + h, some), total = Lanes::set(0);
        for (int64_t s = 1; s < spans; ++s)
            peak = Lanes::max(peak, load(peaks + s * heads + h, some));
        for (int64_t s = 0; s < spans; ++s) {
            const F share = exponential(Lanes::sub(load(peaks + s * heads + h, some), peak));
            total = Lanes::fma(share, load(totals + s * heads + h, some), total);
            store(shares + s * heads + h, share, some);
        }
        for (int64_t s = 0; s < spans; ++s) {
            float* const at = shares + s * heads + h;
            store(at, Lanes::div(load(at, some), total), some);
        }
    });
    for (int64_t h = 0; h < heads; ++h)
        each_vector(head_dim, [&](int64_t e, int64_t some) {
            F sum = Lanes::set(0);
            for (int64_t s = 0; s < spans; ++s)
                sum = Lanes::fma(Lanes::set(shares[s * heads + h]),
                                 load(data + s * width + h * head_dim + e, some), sum);
            store(out + h * head_dim + e, sum, some);
        });
}

// (head_dim,) floats as T, zeros up to whole vectors; returns the scale of int8.
template <class T>
float narrow(const float* from, int64_t head_dim, T* to) {
    constexpr bool kWhole = std::is_same_v<T, int8_t>;
    float largest = 0;
    if constexpr (kWhole) {  // as integers, so that NaN is above infinity and spoils the scale
        std::uint32_t most = 0;
        for (int64_t e = 0; e < head_dim; ++e) {
            std::uint32_t bits;
            std::memcpy(&bits, from + e, sizeof bits);
            most = std::max(most, bits & 0x7fffffffu);
        }
        std::memcpy(&largest, &most, sizeof most);
    }
    const F factor = Lanes::set(largest > 1e-30f ? 127.0f / largest : 0.0f);
    for (int64_t e = 0; e < head_dim; e += Lanes::count) {
        F v = Lanes::load(from + e, std::min<int64_t>(Lanes::count, head_dim - e));
        if constexpr (kWhole)
            v = std::isfinite(largest) ? Lanes::round(Lanes::mul(v, factor)) : Lanes::set(0);
        Lanes::store(to + e, v);
    }
    return largest / 127.0f;
}

template <class T>
void append_as(const KvShape& shape, uint8_t* page, int64_t head, int64_t at, const float* key,
               const float* value) {
    const Head<T> place(shape, page, head);
    T narrowed[kMaxHeadDim];
    const float key_scale = narrow(key, shape.head_dim, narrowed);
    T* const keys =
        const_cast<T*>(place.keys) + at / kStripe * kStripe * shape.head_dim + at % kStripe;
    for (int64_t e = 0; e < shape.head_dim; ++e) keys[e * kStripe] = narrowed[e];
    const float value_scale =
        narrow(value, shape.head_dim, const_cast<T*>(place.values) + at * shape.width);
    if (!std::is_same_v<T, int8_t>) return;
    const_cast<float*>(place.key_scales)[at] = key_scale;
    const_cast<float*>(place.value_scales)[at] = value_scale;
}

void append(const KvShape& shape, uint8_t* const* pages, int64_t head, int64_t position,
            const float* key, const float* value) {
    uint8_t* const page = pages[position / kPage];
    const int64_t at = position % kPage;
    switch (shape.type) {
        case KvType::float32: return append_as<float>(shape, page, head, at, key, value);
        case KvType::float16: return append_as<std::uint16_t>(shape, page, head, at, key, value);
        case KvType::int8: return append_as<int8_t>(shape, page, head, at, key, value);
    }
}

constexpr AttentionKernels make_attention_kernels() {
    AttentionKernels kernels{};
    kernels.append = append;
    kernels.fetch = fetch;
    kernels.attend = attend;
    kernels.combine = combine;
    kernels.query_rows = 48;
    return kernels;
}

}  // namespace
}  // namespace shallow
