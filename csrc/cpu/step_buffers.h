// The memory of a step: what its threads share, and what each has for itself.
// defines: kKeptRows Mine Buffers
#pragma once

#include <cstdint>

#include "cpu/step.h"

namespace shallow {

// Chunks of so few rows every thread keeps whole for itself, which saves barriers and the traffic
// of rows between cores.
constexpr std::int64_t kKeptRows = 8;

struct Mine {
    float *x, *qkv;                     // of kept rows: (rows, hidden), (rows, qkv_width)
    float *staged, *spare;              // a panel of inputs, and the same in another column order
    std::uint8_t *hidden_forms, *attended_forms;  // of kept rows
    float* attention;
    std::uint8_t* unpacked;
};

struct Buffers {
    float *x;                        // (rows, hidden): the residual stream
    float *qkv, *attended;           // (rows, qkv_width), (rows, query_width)
    float *y, *y2;                   // (rows, hidden): what is to be added to x
    float* up;                       // (rows, up_stride): the gate lies behind
    float *mixed, *peaks, *totals;   // of spans: (rows, kMaxSpans, query_width), (..., heads)
    std::uint8_t *hidden_forms, *attended_forms, *up_forms;
    std::int64_t bytes;
    std::int64_t mine_bytes;
    std::uint8_t* mine;

    // Measures only where base is null.
    Buffers(const Model& model, const Chunk& chunk, int threads, std::uint8_t* base);
    Mine of(const Model& model, const Chunk& chunk, int thread, int threads) const;
};

}  // namespace shallow
