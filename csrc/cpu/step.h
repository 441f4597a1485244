// One chunk of tokens through the layers, by a team of threads that meet at few barriers.
// defines: Rules Model Layer Row RowSet Chunk Times run_step
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "cpu/attention.h"
#include "cpu/product.h"
#include "cpu/rows.h"
#include "cpu/threads.h"

namespace shallow {

enum class QkNorm : int { none, head, all };

// What the family and the sizes fix; names as in engine/config.py.
struct Rules {
    std::int64_t hidden, vocab, heads, kv_heads, head_dim, ffn, max_context;
    float norm_eps, attention_scale, attention_softcap, logit_softcap, embedding_scale;
    bool centred, gated, parallel;  // centred: LayerNorm
    QkNorm qk_norm;
    Activation activation;
    Mode mode;

    std::int64_t query_width() const { return heads * head_dim; }
    std::int64_t key_width() const { return kv_heads * head_dim; }
    std::int64_t up_width() const { return gated ? 2 * ffn : ffn; }
    // An odd number of cache lines: rows a power of two apart would share few cache sets.
    std::int64_t up_stride() const { return (up_width() + 15) / 16 * 16 | 16; }
    std::int64_t qkv_width() const { return query_width() + 2 * key_width(); }
};

// Norms without weight are absent.
struct Layer {
    Norm attn_norm, attn_post, mlp_norm, mlp_post, q_norm, k_norm;
    Input qkv_input, o_input, up_input, down_input;  // parallel: qkv_input is up's as well
    Product qkv, o, up, down;                        // up: the gate runs aside
    std::int64_t window;
    int rope;
    std::int64_t rope_dim;
};

struct Model {
    Rules rules;
    const Kernels* kernels;
    const RowKernels* row_kernels;
    const AttentionKernels* attention_kernels;
    std::vector<Layer> layers;
    Norm final_norm;
    Input head_input;
    Product head;
    MatrixRef embedding;          // or
    const void* embedding_rows;   // (vocab, hidden)
    ScaleType embedding_type;

    Model(const Rules& rules, Isa isa);
    void embed(std::int64_t token, float* x) const;
};

struct Row {
    std::int64_t token, sequence, position;
    bool wanted;  // its logits are
};

// Work of attention: queries of one sequence for one kv head over all positions or a span of them.
struct AttentionItem {
    std::int64_t first, count;  // rows of the set
    std::int64_t sequence, position;
    std::int64_t head, span, spans, begin, end;
};

// The rows of a chunk that run through some layers, in order.
struct RowSet {
    std::vector<std::int32_t> rows;
    std::vector<std::int32_t> spans;  // of each row's attention
    std::vector<AttentionItem> items;
    bool split = false;               // some row has more than one span
    bool lone = false;                // each row is its sequence's only one

    std::int64_t size() const { return static_cast<std::int64_t>(rows.size()); }
    void add_items(const std::vector<Row>& chunk, const Model& model);
};

constexpr std::int64_t kMaxSpans = 8;

// The largest of some logits of a row, at its lowest column; value NaN where one is.
struct Best {
    float value = -std::numeric_limits<float>::infinity();
    std::int64_t column = 0;

    void meet(const Best& other) {
        if (other.value > value || (other.value == value && other.column < column) ||
            std::isnan(other.value))
            *this = other;
    }
};

struct Chunk {
    std::vector<Row> rows;
    std::vector<RowSet> sets;         // the first `used` of them
    std::size_t used = 0;
    std::vector<std::size_t> set_of;  // slot -> set
    std::size_t wanted = 0;           // set of the rows whose logits are
    const float* const* angles;
    KvCache* cache;
    float* logits;                    // (wanted rows, vocab)
    Best* best;                       // null, or (threads, wanted rows): what each thread met

    std::int64_t size() const { return static_cast<std::int64_t>(rows.size()); }
};

// Seconds of the first thread by part, and of the whole calls.
enum class Part : int { embed, norm, qkv, rope, attention, mix, o, up, gate, down, head, wait };
constexpr int kPartCount = 12;
struct Times {
    double seconds[kPartCount], whole;
    std::int64_t calls, tokens;
};

// Queues that a step consumes.
std::size_t queues_needed(const Model& model);
std::int64_t workspace_bytes(const Model& model, const Chunk& chunk, int threads);
// times may be null
void run_step(const Model& model, const Chunk& chunk, int threads, std::uint8_t* workspace,
              Queue* queues, Times* times);

}  // namespace shallow
