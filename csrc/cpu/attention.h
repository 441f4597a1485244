// Grouped-query attention over pages of keys and values, with a running softmax.
// defines: Span Queries Attended AttentionKernels attention_kernels attention_scratch
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "cpu/kv_cache.h"

namespace shallow {

// Consecutive queries of one sequence, for the heads that share one kv head: row r of
// `count * heads` is head r % heads of query r / heads.
struct Queries {
    const float* data;  // element e of row r: data[r / heads * stride + r % heads * head_dim + e]
    std::int64_t stride;
    std::int64_t count, heads;
    std::int64_t position;  // of the first query
    std::int64_t window;    // positions that a query sees, itself included; 0: all
    float scale, softcap;   // of the scores; softcap 0: none

    const float* row(std::int64_t r, std::int64_t head_dim) const {
        return data + r / heads * stride + r % heads * head_dim;
    }
};

// The outcome over a span of positions.
struct Attended {
    float* data;  // rows as the queries', written
    std::int64_t stride;
    // null where the span is all; else data are sums of shares * values, weighed by exp(score - peak)
    float* peaks;   // (rows,): -inf where the span holds nothing visible
    float* totals;  // (rows,): sums of shares
};

// Positions begin..end-1 of one kv head of a sequence; begin is a multiple of kPage.
struct Span {
    std::uint8_t* const* pages;
    std::int64_t head, begin, end;
};

struct AttentionKernels {
    // Stores the key and value (head_dim) of kv head `head` at `position`.
    void (*append)(const KvShape& shape, std::uint8_t* const* pages, std::int64_t head,
                   std::int64_t position, const float* key, const float* value);
    // Asks for the first page of a span that is not empty, which attend() is to read soon.
    void (*fetch)(const KvShape& shape, const Span& span);
    // `next`, what the thread attends to next, is fetched in the end; it may be empty. Scratch as
    // below.
    void (*attend)(const KvShape& shape, const Span& span, const Span& next, const Queries& queries,
                   const Attended& to, float* scratch);
    // A query's outcome over all its spans: data (spans, heads, head_dim), peaks and totals
    // (spans, heads); shares: scratch of the size of peaks.
    void (*combine)(const float* data, const float* peaks, const float* totals, std::int64_t heads,
                    std::int64_t spans, std::int64_t head_dim, float* shares, float* out);
    std::int64_t query_rows;  // of one attend() at most, or one query's heads
};

constexpr std::int64_t kMaxHeadDim = 1024;

// Floats that attend() needs for `rows` rows.
std::int64_t attention_scratch(const KvShape& shape, std::int64_t rows);

#if defined(SHALLOW_X86)
extern const AttentionKernels kAttentionAvx2, kAttentionAvx512, kAttentionAmx;
extern const AttentionKernels kAttentionWordsAvx2, kAttentionWordsAvxvnni, kAttentionWordsAvx512;
#elif defined(SHALLOW_ARM)
extern const AttentionKernels kAttentionNeon;
#endif
extern const AttentionKernels kAttentionGeneric;
// rounds: many rows may be rounded to 16 bits where that is fastest.
const AttentionKernels& attention_kernels(Isa isa, bool rounds);

}  // namespace shallow
