// The attention of a step in one layer: from queries, keys and values to the input of `o`.
// defines: StepAttention
#pragma once

#include "cpu/step_worker.h"

namespace shallow {

class StepAttention {
public:
    StepAttention(Worker& worker, const Layer& layer, std::int64_t slot, const RowSet& set);

    // Asks for what this thread attends to first, while others still multiply.
    void fetch() const;
    // Behind a barrier; returns the forms of `o`'s input.
    std::uint8_t* run();

private:
    bool rounds_heads() const;
    void rotate();
    void rotate_row(float* qkv, std::int64_t position) const;
    void append(std::int64_t row, std::int64_t head) const;
    void attend();
    void attend_item(const AttentionItem& item, const Span& next) const;
    template <class Visit>
    void each_fair_item(const Visit& visit) const;
    Queries queries(const AttentionItem& item) const;
    Attended target(const AttentionItem& item) const;
    std::int64_t oldest(const AttentionItem& item) const;
    Span span(const AttentionItem& item) const;
    void combine();
    void combine_spans(std::int64_t row, float* out) const;

    Worker& w_;
    const Rules& rules_;
    const Layer& layer_;
    const std::int64_t slot_;
    const RowSet& set_;
    const bool rounds_heads_;    // each item rounds its own columns of `o`'s input
    std::uint8_t* const forms_;  // of that input
};

}  // namespace shallow
