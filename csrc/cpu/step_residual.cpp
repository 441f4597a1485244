#include "cpu/step_residual.h"

namespace shallow {

void Residual::embed() {
    const float scale = w_.rules.embedding_scale;
    const std::int64_t step = w_.kept ? 1 : w_.threads;
    for (std::int64_t i = w_.kept ? 0 : w_.thread; i < w_.chunk.size(); i += step) {
        float* const x = w_.x.row(i);
        if (w_.chunk.entering) {
            const float* const from = w_.chunk.entering + i * w_.rules.hidden;
            std::copy(from, from + w_.rules.hidden, x);
            continue;
        }
        w_.model.embed(w_.chunk.rows[static_cast<std::size_t>(i)].token, x);
        if (scale != 1.0f) w_.model.row_kernels.scale(x, scale, w_.rules.hidden);
    }
    w_.mark(Part::embed);
    w_.barrier_unless_kept();
}

void Residual::leave() {
    if (pending_.set) add_all_pending();
    for (std::int64_t i = w_.thread; i < w_.chunk.size(); i += w_.threads) {
        const float* const x = w_.x.row(i);
        std::copy(x, x + w_.rules.hidden, w_.chunk.leaving + i * w_.rules.hidden);
    }
}

void Residual::add(const RowSet& set, const Norm& post, const FloatRows& y, const FloatRows* y2) {
    pending_.set = &set;
    pending_.post = post.weight ? &post : nullptr;
    pending_.y = &y;
    pending_.y2 = y2;
}

void Residual::write_norm(const RowSet& set, const Norm& norm, const Input& input) {
    const std::int64_t hidden = w_.rules.hidden;
    if (pending_.set && pending_.set != &set) add_all_pending();
    const FloatRows staged{w_.own.staged, hidden};
    w_.each_share_or_kept(set.size(), [&](std::int64_t i, std::int64_t count) {
        for (std::int64_t r = 0; r < count; ++r) {
            if (pending_.set) add_pending(i + r);
            const float* const x = w_.x.row(set.members[static_cast<std::size_t>(i + r)]);
            if (norm.weight)
                w_.model.row_kernels.normalise(norm, x, staged.row(r), hidden);
            else
                std::copy(x, x + hidden, staged.row(r));
        }
        input.write(staged.part(0, count, 0, hidden), w_.hidden_forms, set.size(), i, w_.own.spare);
    });
    pending_.set = nullptr;
    w_.mark(Part::norm);
    w_.barrier_unless_kept();
}

void Residual::add_all_pending() {
    w_.each_share_or_kept(pending_.set->size(), [&](std::int64_t i, std::int64_t count) {
        for (std::int64_t r = i; r < i + count; ++r) add_pending(r);
    });
    w_.barrier_unless_kept();
    pending_.set = nullptr;
}

void Residual::add_pending(std::int64_t row) {
    const std::int64_t hidden = w_.rules.hidden;
    const RowKernels& kernels = w_.model.row_kernels;
    float* const x = w_.x.row(pending_.set->members[static_cast<std::size_t>(row)]);
    const float* y = pending_.y->row(row);
    if (pending_.post) {
        kernels.normalise(*pending_.post, y, w_.own.spare, hidden);
        y = w_.own.spare;
    }
    kernels.add(x, y, hidden);
    if (pending_.y2) kernels.add(x, pending_.y2->row(row), hidden);
}

}  // namespace shallow
