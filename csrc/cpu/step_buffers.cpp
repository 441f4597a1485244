#include "cpu/step_buffers.h"

#include <algorithm>

namespace shallow {
namespace {

std::int64_t widest(const Rules& r) { return std::max({r.hidden, r.query_width(), r.ffn}); }

// visit(rows) of every set. Each is to be measured: where the processor multiplies tiles of bfloat16
// fewer rows than another set's may take more, in other forms and by larger claims.
template <class Visit>
void each_size(const Chunk& chunk, const Visit& visit) {
    for (std::size_t s = 0; s < chunk.used; ++s)
        if (const std::int64_t m = chunk.sets[s].size()) visit(m);
}

std::int64_t unpacked_bytes(const Model& model, const Chunk& chunk, int threads) {
    std::int64_t bytes = 0;
    each_size(chunk, [&](std::int64_t m) {
        bytes = std::max(bytes, model.head.scratch_bytes(m, threads));
        for (const Layer& layer : model.layers)
            for (const Product* product : {&layer.qkv, &layer.o, &layer.up, &layer.down})
                bytes = std::max(bytes, product->scratch_bytes(m, threads));
    });
    return bytes;
}

FloatRows cut_rows(Cutter& cutter, std::int64_t m, std::int64_t stride) {
    return {cutter.cut<float>(m * stride), stride};
}

}  // namespace

FormBytes::FormBytes(const Model& model, std::int64_t m) : hidden(model.head.input().nbytes(m)) {
    for (const Layer& layer : model.layers) {
        hidden = std::max({hidden, layer.qkv.input().nbytes(m), layer.up.input().nbytes(m)});
        attended = std::max(attended, layer.o.input().nbytes(m));
        up = std::max(up, layer.down.input().nbytes(m));
    }
}

void FormBytes::include(const FormBytes& other) {
    hidden = std::max(hidden, other.hidden);
    attended = std::max(attended, other.attended);
    up = std::max(up, other.up);
}

Buffers::Buffers(const Model& model, const Chunk& chunk, int threads, std::uint8_t* base)
    : model_(model), chunk_(chunk), kept_(chunk.size() <= kKeptRows ? chunk.size() : 0),
      kept_forms_(model, std::max<std::int64_t>(kept_, 1)),
      unpacked_bytes_(unpacked_bytes(model, chunk, threads)) {
    const Rules& r = model.rules;
    const std::int64_t m = chunk.size();
    FormBytes forms(model, m);
    each_size(chunk, [&](std::int64_t rows) {
        if (rows != m) forms.include(FormBytes(model, rows));
    });
    bool split = false;
    for (std::size_t s = 0; s < chunk.used; ++s) split |= chunk.sets[s].split;
    const std::int64_t spans = split ? m * kMaxSpans : 0;
    Cutter cutter{base};
    x = cut_rows(cutter, m, r.hidden);
    qkv = cut_rows(cutter, m, r.qkv_width());
    attended = cut_rows(cutter, m, r.query_width());
    y = cut_rows(cutter, m, r.hidden);
    y2 = cut_rows(cutter, r.parallel ? m : 0, r.hidden);
    up = cut_rows(cutter, m, r.up_stride());
    mixed = cutter.cut<float>(spans * r.query_width());
    peaks = cutter.cut<float>(spans * r.heads);
    totals = cutter.cut<float>(spans * r.heads);
    hidden_forms = cutter.cut<std::uint8_t>(forms.hidden);
    attended_forms = cutter.cut<std::uint8_t>(forms.attended);
    up_forms = cutter.cut<std::uint8_t>(forms.up);
    own_ = base ? base + cutter.used : nullptr;
    Cutter measure{nullptr};
    cut_own(measure);
    own_bytes_ = measure.used;
    bytes = cutter.used + own_bytes_ * threads;
}

ThreadBuffers Buffers::of(int thread) const {
    Cutter cutter{own_ + thread * own_bytes_};
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
    own.hidden_forms = cutter.cut<std::uint8_t>(kept_ ? kept_forms_.hidden : 0);
    own.attended_forms = cutter.cut<std::uint8_t>(kept_ ? kept_forms_.attended : 0);
    own.attention = cutter.cut<float>(
        std::max(attention_scratch(chunk_.cache->shape(), query_rows), r.heads * kMaxSpans));
    own.unpacked = cutter.cut<std::uint8_t>(unpacked_bytes_);
    return own;
}

}  // namespace shallow
