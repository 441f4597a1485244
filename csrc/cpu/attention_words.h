// Attention of many rows in words of 16 bits, for files with lanes and words; includes
// attention_kernel.h. An instruction that multiplies and adds takes twice the words that it takes
// floats: attention of a prefill went from 115 to 97 ms on AVX2, 111 to 81 with VNNI, 78 to 46 on
// AVX-512 (benchmarks/results/decoder.md).
//
// Queries, keys, a page's columns of values and its shares are each scaled to a Euclidean norm of
// kNorm at most and rounded: by Cauchy and Schwarz no sum of their products leaves 32 bits. Their
// scales multiply the sums again, and what is not finite stays so in them.
#pragma once

#include "cpu/attention_kernel.h"

namespace shallow {
namespace {

using std::int32_t;

constexpr float kNorm = 32700;
constexpr int64_t kLeastRows = 32;          // from here on a page is rounded
constexpr int kColumns = 2 * Lanes::count;  // of a panel of keys (positions) or values (features)

// to (kRowGroup, kColumns) = left (kRowGroup, steps) @ panel (steps, kColumns), of pairs of words.
// Element (r, s) of left lies at r * kRow + s * kStep. Out of line, so that all sums stay in
// registers.
template <int kRow, int kStep>
__attribute__((noinline)) void multiply(const int32_t* left, const int32_t* panel, int64_t steps,
                                        int32_t* to) {
    Words::I sums[kRowGroup][2];
#pragma GCC unroll 6
    for (auto& row : sums) row[0] = row[1] = Words::zero();
    for (int64_t s = 0; s < steps; ++s, left += kStep, panel += kColumns) {
        const Words::I first = Words::load(panel), second = Words::load(panel + Lanes::count);
#pragma GCC unroll 6
        for (int r = 0; r < kRowGroup; ++r) {
            const Words::I some = Words::set(left[r * kRow]);
            sums[r][0] = Words::add_products(sums[r][0], some, first);
            sums[r][1] = Words::add_products(sums[r][1], some, second);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRowGroup; ++r) {
        Words::store(to + r * kColumns, sums[r][0]);
        Words::store(to + r * kColumns + Lanes::count, sums[r][1]);
    }
}

// What takes a norm to kNorm.
inline F to_words(F norm) {
    return Lanes::div(Lanes::set(kNorm), Lanes::max(Lanes::set(1e-30f), norm));  // NaN stays
}
inline float to_words(float norm) { return kNorm / (norm < 1e-30f ? 1e-30f : norm); }

// One attend(). T: float16 or int8 of the cache; head_dim is a multiple of kColumns.
template <class T>
class WordAttention {
public:
    WordAttention(const KvShape& shape, const Queries& queries, float* scratch)
        : shape_(shape), queries_(queries), head_dim_(shape.head_dim),
          rows_(queries.count * queries.heads), padded_(padded(rows_)) {
        const auto cut = [&](int64_t count) {
            float* const at = scratch;
            scratch += count;
            return at;
        };
        const auto cut_words = [&](int64_t pairs) {
            return reinterpret_cast<int32_t*>(cut(pairs));
        };
        sums_ = cut(padded_ * head_dim_);
        asked_ = cut_words(padded_ * head_dim_ / 2);
        asked_scales_ = cut(padded_);
        softmax_ = reinterpret_cast<Softmax*>(cut(padded_ * 3));
        keys_ = cut_words(kPage * head_dim_ / 2);
        key_scales_ = cut(kPage);
        values_ = cut_words(kPage * head_dim_ / 2);
        value_scales_ = cut(head_dim_);
        scores_ = cut(kRowGroup * kPage);
        shares_ = cut_words(kRowGroup * kPage / 2);
        products_ = cut_words(kRowGroup * kColumns);
    }

    void run(const Span& span, const Attended& to) {
        std::fill(sums_, sums_ + padded_ * head_dim_, 0.0f);
        for (int64_t r = 0; r < padded_; ++r) {
            softmax_[r] = Softmax();
            round_query(r);
        }
        for (int64_t at = span.begin; at < span.end; at += kPage) {
            const Head<T> page(shape_, span.pages[at / kPage], span.head);
            const int64_t positions = std::min(kPage, span.end - at);
            for (int64_t p = 0; p < positions; p += kColumns) round_keys(page, p);
            for (int64_t e = 0; e < head_dim_; e += kColumns) round_values(page, e, positions);
            for (int64_t row = 0; row < padded_; row += kRowGroup) attend_page(row, at, positions);
        }
        write(shape_, queries_, softmax_, sums_, to);
    }

private:
    static int64_t padded(int64_t rows) { return (rows + kRowGroup - 1) / kRowGroup * kRowGroup; }

    // Pair i of a group's row r lies at i * kRowGroup + r, so that the pairs of a group that meet
    // the same keys are neighbours.
    void round_query(int64_t r) {
        int32_t* const to = asked_ + r / kRowGroup * kRowGroup * head_dim_ / 2 + r % kRowGroup;
        if (r >= rows_) {
            for (int64_t i = 0; i < head_dim_ / 2; ++i) to[i * kRowGroup] = 0;
            asked_scales_[r] = 0;
            return;
        }
        const float* const from = queries_.row(r, head_dim_);
        F squares = Lanes::set(0);
        for (int64_t e = 0; e < head_dim_; e += Lanes::count)
            squares = Lanes::fma(Lanes::load(from + e), Lanes::load(from + e), squares);
        const float norm = std::sqrt(Lanes::sum(squares));
        asked_scales_[r] = norm / kNorm * queries_.scale;
        const F factor = Lanes::set(to_words(norm));
        for (int64_t e = 0; e < head_dim_; e += kColumns) {
            Words::store(products_,
                         Words::in_order(Lanes::mul(Lanes::load(from + e), factor),
                                         Lanes::mul(Lanes::load(from + e + Lanes::count), factor)));
            for (int i = 0; i < Lanes::count; ++i) to[(e / 2 + i) * kRowGroup] = products_[i];
        }
    }

    // The panel of the keys of positions p..p + kColumns - 1.
    void round_keys(const Head<T>& page, int64_t p) {
        const T* const from = page.keys + p / kStripe * kStripe * head_dim_ + p % kStripe;
        for (int64_t half = 0; half < kColumns; half += Lanes::count) {
            const T* const key = from + half;
            F squares = Lanes::set(0);
            for (int64_t e = 0; e < head_dim_; ++e) {
                const F some = Lanes::load(key + e * kStripe);
                squares = Lanes::fma(some, some, squares);
            }
            const F norm = Words::root(squares), factor = to_words(norm);
            F scale = Lanes::mul(norm, Lanes::set(1 / kNorm));
            if (kScaled) scale = Lanes::mul(scale, Lanes::load(page.key_scales + p + half));
            Lanes::store(key_scales_ + p + half, scale);
            int32_t* const to = keys_ + p * head_dim_ / 2 + half;
            for (int64_t e = 0; e < head_dim_; e += 2)
                Words::store(
                    to + e / 2 * kColumns,
                    Words::pairs(Lanes::mul(Lanes::load(key + e * kStripe), factor),
                                 Lanes::mul(Lanes::load(key + (e + 1) * kStripe), factor)));
        }
    }

    // The panel of columns e..e + kColumns - 1 of the values of `positions` positions.
    void round_values(const Head<T>& page, int64_t e, int64_t positions) {
        for (int64_t half = 0; half < kColumns; half += Lanes::count) {
            const auto value = [&](int64_t p) {
                if (p >= positions) return Lanes::set(0);
                const F some = Lanes::load(page.values + p * shape_.width + e + half);
                return kScaled ? Lanes::mul(some, Lanes::set(page.value_scales[p])) : some;
            };
            F squares = Lanes::set(0);
            for (int64_t p = 0; p < positions; ++p)
                squares = Lanes::fma(value(p), value(p), squares);
            const F norm = Words::root(squares), factor = to_words(norm);
            Lanes::store(value_scales_ + e + half, Lanes::mul(norm, Lanes::set(1 / kNorm)));
            int32_t* const to = values_ + e * kPage / 2 + half;
            for (int64_t p = 0; p < positions; p += 2)
                Words::store(to + p / 2 * kColumns, Words::pairs(Lanes::mul(value(p), factor),
                                                                 Lanes::mul(value(p + 1), factor)));
        }
    }

    // The rows row..row + kRowGroup - 1 and the page at position `at`, while scores are in L1.
    void attend_page(int64_t row, int64_t at, int64_t positions) {
        const Seen<kRowGroup> seen(queries_, row, at, positions);
        if (seen.begin == seen.end) return;
        for (int64_t p = seen.begin / kColumns * kColumns; p < seen.end; p += kColumns) {
            multiply<1, kRowGroup>(asked_ + row * head_dim_ / 2, keys_ + p * head_dim_ / 2,
                                   head_dim_ / 2, products_);
            each_product([&](int r, int64_t column, F product) {
                Lanes::store(scores_ + r * kPage + p + column, product);
            });
        }
        const Scaling scaling{asked_scales_ + row, key_scales_, queries_.softcap};
        float factors[kRowGroup], scales[kRowGroup];
        update(seen, scaling, nullptr, seen.end, softmax_ + row, scores_, factors);
        for (int r = 0; r < kRowGroup; ++r)
            scales[r] = round_shares(r, softmax_[row + r].latest, seen.begin, seen.end);
        for (int64_t e = 0; e < head_dim_; e += kColumns) {
            multiply<kPage / 2, 1>(shares_ + seen.begin / 2,
                                   values_ + e * kPage / 2 + seen.begin / 2 * kColumns,
                                   (seen.end - seen.begin) / 2, products_);
            each_product([&](int r, int64_t column, F product) {
                float* const sums = sums_ + (row + r) * head_dim_ + e + column;
                const F scale =
                    Lanes::mul(Lanes::set(scales[r]), Lanes::load(value_scales_ + e + column));
                Lanes::store(sums, Lanes::fma(Lanes::load(sums), Lanes::set(factors[r]),
                                              Lanes::mul(product, scale)));
            });
        }
    }

    // Row r's shares of a page, of the sum `total`, as words; returns what these are times of them.
    // None is above 1, so that neither the sum nor its root is below their Euclidean norm.
    float round_shares(int r, float total, int64_t begin, int64_t end) {
        const float norm = std::min(total, std::sqrt(total));
        const float* const from = scores_ + r * kPage;
        int32_t* const to = shares_ + r * kPage / 2;
        const F factor = Lanes::set(to_words(norm));
        for (int64_t p = begin / kColumns * kColumns; p < end; p += kColumns)
            Words::store(to + p / 2,
                         Words::in_order(Lanes::mul(Lanes::load(from + p), factor),
                                         Lanes::mul(Lanes::load(from + p + Lanes::count), factor)));
        return norm / kNorm;
    }

    // visit(row of the group, column, vector) of products_.
    template <class Visit>
    void each_product(const Visit& visit) const {
#pragma GCC unroll 6
        for (int r = 0; r < kRowGroup; ++r)
            for (int64_t column = 0; column < kColumns; column += Lanes::count)
                visit(r, column, Words::to_floats(Words::load(products_ + r * kColumns + column)));
    }

    static constexpr bool kScaled = std::is_same_v<T, int8_t>;
    const KvShape& shape_;
    const Queries& queries_;
    const int64_t head_dim_, rows_, padded_;
    float *sums_, *asked_scales_, *key_scales_, *value_scales_, *scores_;
    int32_t *asked_, *keys_, *values_, *shares_, *products_;
    Softmax* softmax_;
};

void attend_words(const KvShape& shape, const Span& span, const Span& next, const Queries& queries,
                  const Attended& to, float* scratch) {
    const bool many = queries.count * queries.heads >= kLeastRows && shape.head_dim % kColumns == 0;
    if (many && shape.type == KvType::float16)
        WordAttention<std::uint16_t>(shape, queries, scratch).run(span, to);
    else if (many && shape.type == KvType::int8)
        WordAttention<int8_t>(shape, queries, scratch).run(span, to);
    else
        attend(shape, span, next, queries, to, scratch);
}

constexpr AttentionKernels with_words() {
    AttentionKernels kernels = make_attention_kernels();
    kernels.attend = attend_words;
    kernels.query_rows = 192;
    return kernels;
}

}  // namespace
}  // namespace shallow
