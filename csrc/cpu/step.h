// One chunk of tokens through the layers, by a team of threads that meet at few barriers.
// defines: Row AttentionItem RowSet kMaxSpans Best Chunk Part Times queues_needed workspace_bytes
//          run_step
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "cpu/step_sizes.h"
#include "cpu/threads.h"

namespace shallow {

struct Row {
    std::int64_t token, sequence, position;
    bool wanted;  // its logits are
};

// Work of attention: queries of one sequence for one kv head over all positions or a span of them.
struct AttentionItem {
    std::int64_t first, count;        // rows of the set
    std::int64_t sequence, position;  // of the first
    std::int64_t head, span, spans;   // kv head; which of how many spans
    std::int64_t begin, end;          // the span's positions
};

// The rows of a chunk that run through some layers, in order.
struct RowSet {
    std::vector<std::int32_t> members;  // indices of the chunk's rows
    std::vector<std::int32_t> spans;    // of each row's attention
    std::vector<AttentionItem> items;
    bool split = false;  // some row has more than one span
    bool lone = false;   // each row is its sequence's only one

    std::int64_t size() const { return static_cast<std::int64_t>(members.size()); }
    const Row& row(const std::vector<Row>& chunk, std::int64_t i) const {
        return chunk[static_cast<std::size_t>(members[static_cast<std::size_t>(i)])];
    }
    void add_items(const std::vector<Row>& chunk, const Model& model);
};

// Of a row's attention. With 16 a decode at 1,024 tokens is 1.3 % slower, with 5 one at 1,500 1 %
// (benchmarks/results/decoder.md).
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
    std::vector<RowSet> sets;  // the first `used` of them
    std::size_t used = 0;
    std::vector<std::size_t> set_of;  // slot -> set
    std::size_t wanted = 0;           // set of the rows whose logits are
    const float* const* angles;
    KvCache* cache;
    const float* entering;  // null: embeddings; or (rows, hidden): before the first layer
    float* leaving;         // null, or (rows, hidden): after the last layer, and no logits
    float* logits;          // (wanted rows, vocab)
    Best* best;             // null, or (threads, wanted rows): what each thread met
    float* bounds;          // null, or (wanted rows, tiles of the head): see choose_likeliest()

    std::int64_t size() const { return static_cast<std::int64_t>(rows.size()); }
};

// Seconds of the first thread by part, and of the whole calls.
enum class Part : int {
    embed,
    norm,
    qkv,
    rope,
    attention,
    combine,
    o,
    up,
    activate,
    down,
    head,
    wait
};
constexpr int kPartCount = 12;
struct Times {
    double seconds[kPartCount], whole;
};

// Queues that a step consumes.
std::size_t queues_needed(const Model& model);
std::int64_t workspace_bytes(const Model& model, const Chunk& chunk, int threads, Sizes& sizes);
// times may be null
void run_step(const Model& model, const Chunk& chunk, int threads, Sizes& sizes,
              std::uint8_t* workspace, Queue* queues, Times* times);

}  // namespace shallow
