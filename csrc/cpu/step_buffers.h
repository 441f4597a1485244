// The memory of a step: what its threads share, and what each has for itself.
// defines: kKeptRows ThreadBuffers Buffers
#pragma once

#include "cpu/step.h"

namespace shallow {

// Chunks of so few rows every thread keeps whole for itself, which saves half the barriers and the
// traffic of rows between cores: a batch of 8 is faster by it. With 16 rows a batch of 16 gains
// 1.4 % on two threads, which more threads would lose (benchmarks/results/decoder.md).
constexpr std::int64_t kKeptRows = 8;

struct ThreadBuffers {
    FloatRows x, qkv;                             // of kept rows, as below
    float *staged, *spare;                        // a panel of inputs, and in another column order
    std::uint8_t *hidden_forms, *attended_forms;  // of kept rows
    float* attention;
    std::uint8_t* unpacked;
};

struct Buffers {
    FloatRows x;                      // (rows, hidden): the residual stream
    FloatRows qkv, attended;          // (rows, qkv_width), (rows, query_width)
    FloatRows y, y2;                  // (rows, hidden): what is to be added to x
    FloatRows up;                     // (rows, up_width): the gate lies behind
    float *partial, *peaks, *totals;  // of spans: (rows, kMaxSpans, query_width), (..., heads)
    std::uint8_t *hidden_forms, *attended_forms, *up_forms;
    std::int64_t bytes;  // of all, the threads' own included

    // Measures only where base is null.
    Buffers(const Model& model, const Chunk& chunk, int threads, Sizes& sizes, std::uint8_t* base);
    ThreadBuffers of(int thread) const;

private:
    ThreadBuffers cut_own(Cutter& cutter) const;

    const Model& model_;
    const Chunk& chunk_;
    const std::int64_t kept_;  // rows
    RowSizes kept_sizes_;
    std::int64_t unpacked_bytes_;
    std::uint8_t* own_;  // the first thread's
    std::int64_t own_bytes_;
};

}  // namespace shallow
