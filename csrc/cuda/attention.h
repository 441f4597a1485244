// Decode attention: one token a sequence over keys and values in pages.
// defines: shallow::Scope, DecodeAttention, decode_attention, prepare_decode_attention
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/w4_matmul.h"

namespace shallow {

constexpr int kMaxQueries = 16;     // heads that share a key
constexpr int kMaxHeadWidth = 256;  // E
constexpr int kMaxSplits = 32;

enum class Scope : std::int32_t { none, head, all };  // what the norm of queries and keys is over

// Mirrored by kernels/layer/cuda.py; arrays are contiguous, those without a type are of `type`.
// What it computes is kernels/layer/attention.py's, which takes the same buffers.
struct DecodeAttention {
    const void* qkv;                // (B, (H + 2 G) E)
    void* store;                    // (pages, slots, 2, G, page, E)
    const std::int32_t* table;      // (B, table_width)
    const std::int32_t* positions;  // (B,)
    const std::int32_t* live;       // (B,)
    const float* angles;            // null, or (positions, rope): cosines, then sines
    const float* q_norm;            // null; (E,) or, of all heads, (H E,)
    const float* q_bias;            // null, or as q_norm
    const float* k_norm;            // null; (E,) or (G E,)
    const float* k_bias;            // null, or as k_norm
    float* parts;                   // (B, G, splits, R (E + 2)), R = H / G, with splits > 1
    std::int32_t* counters;         // (B, G) zeros, and zeros again afterwards
    void* y;                        // (B, H E)
    std::int32_t batch, heads, kv_heads, width;
    std::int32_t slots, slot, page, table_width;
    std::int32_t rope, window, splits;  // 0: no rotation, no window
    w4::ScaleType type;                 // float16 or bfloat16
    Norm norm_kind;
    Scope scope;
    float epsilon, scale, cap;  // cap 0: none
    std::int32_t overlap;       // as in W4Matmul
};

static_assert(std::is_trivially_copyable<DecodeAttention>::value, "filled from Python");
static_assert(sizeof(DecodeAttention) == 13 * 8 + 18 * 4, "no padding");

// Launches on the current device: appends the token's keys and values, and writes y. Throws
// std::invalid_argument for arguments it cannot take, std::runtime_error with CUDA's own message.
void decode_attention(const DecodeAttention& call, void* stream);

// As prepare_w4_matmul.
void prepare_decode_attention();

}  // namespace shallow
