#include "cpu/step_buffers.h"

#include <algorithm>

namespace shallow {
namespace {

// Parts of the workspace, handed out in order; first measured with a null base.
struct Cutter {
    std::uint8_t* base;
    std::int64_t used = 0;

    template <class T>
    T* cut(std::int64_t count) {
        T* const part = base ? reinterpret_cast<T*>(base + used) : nullptr;
        used += (count * static_cast<std::int64_t>(sizeof(T)) + 63) / 64 * 64;
        return part;
    }
};

// The most bytes that m rows take in each kind of form.
struct FormBytes {
    std::int64_t hidden, attended = 0, up = 0;

    FormBytes(const Model& model, std::int64_t m) : hidden(model.head_input.nbytes(m)) {
        for (const Layer& layer : model.layers) {
            hidden = std::max({hidden, layer.qkv_input.nbytes(m), layer.up_input.nbytes(m)});
            attended = std::max(attended, layer.o_input.nbytes(m));
            up = std::max(up, layer.down_input.nbytes(m));
        }
    }
};

std::int64_t widest(const Rules& r) { return std::max({r.hidden, r.query_width(), r.ffn}); }

std::int64_t unpacked_bytes(const Model& model, std::int64_t m, int threads) {
    std::int64_t bytes = model.head.scratch_bytes(model.head_input, m, threads);
    for (const Layer& layer : model.layers) {
        const Input& up_input = model.rules.parallel ? layer.qkv_input : layer.up_input;
        bytes = std::max({bytes, layer.qkv.scratch_bytes(layer.qkv_input, m, threads),
                          layer.o.scratch_bytes(layer.o_input, m, threads),
                          layer.up.scratch_bytes(up_input, m, threads),
                          layer.down.scratch_bytes(layer.down_input, m, threads)});
    }
    return bytes;
}

Mine cut_mine(Cutter& cutter, const Model& model, const Chunk& chunk, int threads) {
    const Rules& r = model.rules;
    const std::int64_t m = chunk.size(), panel = std::min<std::int64_t>(m, kPanelRows);
    const std::int64_t kept = m <= kKeptRows ? m : 0;
    const FormBytes forms(model, std::max<std::int64_t>(kept, 1));
    const std::int64_t query_rows = std::max(model.attention_kernels->query_rows, r.heads / r.kv_heads);
    Mine mine;
    mine.x = cutter.cut<float>(kept * r.hidden);
    mine.qkv = cutter.cut<float>(kept * r.qkv_width());
    mine.staged = cutter.cut<float>(panel * widest(r));
    mine.spare = cutter.cut<float>(panel * widest(r));
    mine.hidden_forms = cutter.cut<std::uint8_t>(kept ? forms.hidden : 0);
    mine.attended_forms = cutter.cut<std::uint8_t>(kept ? forms.attended : 0);
    mine.attention = cutter.cut<float>(std::max(
        attention_scratch(chunk.cache->shape(), query_rows), r.heads * kMaxSpans));
    mine.unpacked = cutter.cut<std::uint8_t>(unpacked_bytes(model, m, threads));
    return mine;
}

}  // namespace

Buffers::Buffers(const Model& model, const Chunk& chunk, int threads, std::uint8_t* base) {
    const Rules& r = model.rules;
    const std::int64_t m = chunk.size();
    const FormBytes forms(model, m);
    bool split = false;
    for (std::size_t s = 0; s < chunk.used; ++s) split |= chunk.sets[s].split;
    const std::int64_t spans = split ? m * kMaxSpans : 0;
    Cutter cutter{base};
    x = cutter.cut<float>(m * r.hidden);
    qkv = cutter.cut<float>(m * r.qkv_width());
    attended = cutter.cut<float>(m * r.query_width());
    y = cutter.cut<float>(m * r.hidden);
    y2 = cutter.cut<float>(r.parallel ? m * r.hidden : 0);
    up = cutter.cut<float>(m * r.up_stride());
    mixed = cutter.cut<float>(spans * r.query_width());
    peaks = cutter.cut<float>(spans * r.heads);
    totals = cutter.cut<float>(spans * r.heads);
    hidden_forms = cutter.cut<std::uint8_t>(forms.hidden);
    attended_forms = cutter.cut<std::uint8_t>(forms.attended);
    up_forms = cutter.cut<std::uint8_t>(forms.up);
    mine = base ? base + cutter.used : nullptr;
    Cutter measure{nullptr};
    cut_mine(measure, model, chunk, threads);
    mine_bytes = measure.used;
    bytes = cutter.used + mine_bytes * threads;
}

Mine Buffers::of(const Model& model, const Chunk& chunk, int thread, int threads) const {
    Cutter cutter{mine + thread * mine_bytes};
    return cut_mine(cutter, model, chunk, threads);
}

}  // namespace shallow
