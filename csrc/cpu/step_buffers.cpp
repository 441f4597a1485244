#include "cpu/step_buffers.h"

#include <algorithm>

namespace shallow {
namespace {

std::int64_t widest(const Rules& r) { return std::max({r.hidden, r.query_width(), r.ffn}); }

FloatRows cut_rows(Cutter& cutter, std::int64_t m, std::int64_t stride) {
    return {cutter.cut<float>(m * stride), stride};
}

}  // namespace

Buffers::Buffers(const Model& model, const Chunk& chunk, int threads, Sizes& sizes,
                 std::uint8_t* base)
    : model_(model), chunk_(chunk), kept_(chunk.size() <= kKeptRows ? chunk.size() : 0) {
    const Rules& r = model.rules;
    const std::int64_t m = chunk.size();
    if (kept_) kept_sizes_ = sizes.of(model, kept_, threads);
    RowSizes most = sizes.of(model, m, threads);
    // Each set's: where the processor multiplies tiles of bfloat16 fewer rows may take more, in other
    // forms and by larger claims.
    for (std::size_t s = 0; s < chunk.used; ++s)
        if (const std::int64_t rows = chunk.sets[s].size())
            most.include(sizes.of(model, rows, threads));
    unpacked_bytes_ = most.unpacked;
    bool split = false;
    for (std::size_t s = 0; s < chunk.used; ++s) split |= chunk.sets[s].split;
    const std::int64_t spans = split ? m * kMaxSpans : 0;
    Cutter cutter{base, 0, kSanitizerGap};
    x = cut_rows(cutter, m, r.hidden);
    qkv = cut_rows(cutter, m, r.qkv_width());
    attended = cut_rows(cutter, m, r.query_width());
    y = cut_rows(cutter, m, r.hidden);
    y2 = cut_rows(cutter, r.parallel ? m : 0, r.hidden);
    up = cut_rows(cutter, m, r.up_stride());
    partial = cutter.cut<float>(spans * r.query_width());
    peaks = cutter.cut<float>(spans * r.heads);
    totals = cutter.cut<float>(spans * r.heads);
    hidden_forms = cutter.cut<std::uint8_t>(most.hidden);
    attended_forms = cutter.cut<std::uint8_t>(most.attended);
    up_forms = cutter.cut<std::uint8_t>(most.up);
    own_ = base ? base + cutter.used : nullptr;
    Cutter measure{nullptr, 0, kSanitizerGap};
    cut_own(measure);
    own_bytes_ = measure.used;
    bytes = cutter.used + own_bytes_ * threads;
}

ThreadBuffers Buffers::of(int thread) const {
    Cutter cutter{own_ + thread * own_bytes_, 0, kSanitizerGap};
    return cut_own(cutter);
}

ThreadBuffers Buffers::cut_own(Cutter& cutter) const {
    const Rules& r = model_.rules;
    const std::int64_t panel = std::min<std::int64_t>(chunk_.size(), kPanelRows);
    const std::int64_t query_rows =
        std::max(model_.attention_kernels.query_rows, r.heads / r.kv_heads);
    ThreadBuffers own;
    own.x = cut_rows(cutter, kept_, r.hidden);
    own.qkv = cut_rows(cutter, kept_, r.qkv_width());
    own.staged = cutter.cut<float>(panel * widest(r));
    own.spare = cutter.cut<float>(panel * widest(r));
    own.hidden_forms = cutter.cut<std::uint8_t>(kept_sizes_.hidden);
    own.attended_forms = cutter.cut<std::uint8_t>(kept_sizes_.attended);
    own.attention = cutter.cut<float>(
        std::max(attention_scratch(chunk_.cache->shape(), query_rows), r.heads * kMaxSpans));
    own.unpacked = cutter.cut<std::uint8_t>(unpacked_bytes_);
    return own;
}

}  // namespace shallow
