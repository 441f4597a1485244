#include "cpu/step.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "cpu/step_buffers.h"

namespace shallow {
namespace {

// What is still to be added to the residual stream of a set's rows.
struct Pending {
    const RowSet* set = nullptr;
    const float *y = nullptr, *y2 = nullptr;  // (rows, hidden)
    const Norm* post = nullptr;               // applied to y first
};

constexpr std::int64_t kNearBytes = 16 << 10;  // of L1 for outputs that are to be activated
constexpr std::int64_t kItemPositions = 32;  // that cost as much as an item of attention itself

class Worker {
public:
    Worker(const Model& model, const Chunk& chunk, const Buffers& buffers, Queue* queues,
           Barrier& barrier, int thread, int threads, int planned, Times* times)
        : model_(model), rules_(model.rules), rows_(*model.row_kernels), chunk_(chunk),
          shared_(buffers), mine_(buffers.of(model, chunk, thread, planned)), queue_(queues),
          barrier_(barrier), thread_(thread), threads_(threads), planned_(planned),
          kept_(chunk.size() <= kKeptRows), times_(thread == 0 ? times : nullptr) {
        if (times_) last_ = std::chrono::steady_clock::now();
    }

    void run() {
        embed();
        for (std::size_t slot = 0; slot < model_.layers.size(); ++slot) {
            set_ = &chunk_.sets[chunk_.set_of[slot]];
            if (set_->size()) layer(model_.layers[slot], static_cast<std::int64_t>(slot));
        }
        set_ = &chunk_.sets[chunk_.wanted];
        if (set_->size()) head();
    }

private:
    void layer(const Layer& layer, std::int64_t slot) {
        const Rules& r = rules_;
        const Input& up_input = r.parallel ? layer.qkv_input : layer.up_input;
        // The input of `down` is rounded where it is activated, if threads may divide its columns.
        std::int64_t grain = set_->size() < kManyRows ? layer.down_input.grain() : 0;
        if (grain * planned_ * 4 > r.ffn) grain = 0;  // too uneven
        const auto widen = [&] {
            multiply(layer.up, up_input, hidden_forms(), shared_.up, r.up_stride(), Part::up,
                     std::max<std::int64_t>(grain / kTileRows, 1),
                     [&](std::int64_t begin, std::int64_t end) {
                         activate(begin, end);
                         if (grain)
                             layer.down_input.write_columns(
                                 shared_.up_forms, set_->size(), 0, shared_.up, r.up_stride(),
                                 set_->size(), begin * kTileRows,
                                 std::min(end * kTileRows, r.ffn));
                         mark(Part::gate);
                     });
        };
        enter(layer.attn_norm, layer.qkv_input);
        multiply(layer.qkv, layer.qkv_input, hidden_forms(), shared_.qkv, r.qkv_width(), Part::qkv);
        if (r.parallel) widen();
        meet();
        turn(layer, slot);
        rounded_ = rounds_heads(layer.o_input);
        attend(layer, slot);
        meet();
        if (!rounded_) mix(layer.o_input);
        multiply(layer.o, layer.o_input, attended_forms(), shared_.y, r.hidden, Part::o);
        meet();
        if (!r.parallel) {
            pending_ = {set_, shared_.y, nullptr, present(layer.attn_post)};
            enter(layer.mlp_norm, layer.up_input);
            widen();
            meet();
        }
        if (!grain) round_up(layer.down_input);
        float* const y = r.parallel ? shared_.y2 : shared_.y;
        multiply(layer.down, layer.down_input, shared_.up_forms, y, r.hidden, Part::down);
        meet();
        pending_ = {set_, shared_.y, r.parallel ? shared_.y2 : nullptr, present(layer.mlp_post)};
    }

    void round_up(const Input& input) {
        const std::int64_t width = rules_.up_stride();
        each_share([&](std::int64_t i, std::int64_t count) {
            input.write(shared_.up_forms, set_->size(), i, shared_.up + i * width, width, count,
                        mine_.spare);
        });
        mark(Part::norm);
        meet();
    }

    void embed() {
        for (std::int64_t i = kept_ ? 0 : thread_; i < chunk_.size(); i += kept_ ? 1 : threads_) {
            float* const x = stream(static_cast<std::int32_t>(i));
            model_.embed(chunk_.rows[static_cast<std::size_t>(i)].token, x);
            if (rules_.embedding_scale != 1.0f) rows_.scale(x, rules_.embedding_scale, rules_.hidden);
        }
        mark(Part::embed);
        settle_rows();
    }

    void head() {
        enter(model_.final_norm, model_.head_input);
        const float cap = rules_.logit_softcap;
        multiply(model_.head, model_.head_input, hidden_forms(), chunk_.logits, rules_.vocab,
                 Part::head, 1, [&](std::int64_t begin, std::int64_t end) {
                     if (cap == 0 && !chunk_.best) return;
                     columns(begin, end, rules_.vocab, [&](std::int64_t i, std::int64_t at,
                                                           std::int64_t n) {
                         float* const logits = chunk_.logits + i * rules_.vocab + at;
                         if (cap != 0) rows_.softcap(logits, cap, n);
                         if (!chunk_.best) return;
                         const std::int64_t top = rows_.largest(logits, n);  // still in its caches
                         chunk_.best[thread_ * set_->size() + i].meet(
                             {top < 0 ? NAN : logits[top], at + top});
                     });
                 });
    }

    // Adds what is pending to the residual stream, norms it and writes it as `input` wants it.
    void enter(const Norm& norm, const Input& input) {
        const std::int64_t hidden = rules_.hidden;
        if (pending_.set && pending_.set != set_) {
            const RowSet* const next = set_;
            set_ = pending_.set;
            each_unit([&](std::int64_t i, std::int64_t count) {
                for (std::int64_t r = i; r < i + count; ++r) settle(r);
            });
            settle_rows();
            set_ = next;
            pending_.set = nullptr;
        }
        each_unit([&](std::int64_t i, std::int64_t count) {
            for (std::int64_t r = 0; r < count; ++r) {
                const float* const x = pending_.set ? settle(i + r) : stream(row(i + r));
                float* const staged = mine_.staged + r * hidden;
                if (norm.weight)
                    rows_.normalise(norm, x, staged, hidden);
                else
                    std::copy(x, x + hidden, staged);
            }
            input.write(hidden_forms(), set_->size(), i, mine_.staged, hidden, count, mine_.spare);
        });
        pending_.set = nullptr;
        mark(Part::norm);
        settle_rows();
    }

    float* settle(std::int64_t i) {
        const std::int64_t hidden = rules_.hidden;
        float* const x = stream(row(i));
        const float* y = pending_.y + i * hidden;
        if (pending_.post) {
            rows_.normalise(*pending_.post, y, mine_.spare, hidden);
            y = mine_.spare;
        }
        rows_.add(x, y, hidden);
        if (pending_.y2) rows_.add(x, pending_.y2 + i * hidden, hidden);
        return x;
    }

    // Norms and turns queries and keys; stores keys and values unless attention does.
    void turn(const Layer& layer, std::int64_t slot) {
        const std::int64_t width = rules_.qkv_width();
        each_unit([&](std::int64_t i, std::int64_t count) {
            for (std::int64_t r = i; r < i + count; ++r) {
                if (kept_) std::copy_n(shared_.qkv + r * width, width, mine_.qkv + r * width);
                turn_row(layer, qkv(r), chunk_.rows[static_cast<std::size_t>(row(r))].position);
                if (set_->lone || (kept_ && r % threads_ != thread_)) continue;
                for (std::int64_t g = 0; g < rules_.kv_heads; ++g) append(slot, r, g);
            }
        });
        mark(Part::rope);
        if (!kept_ || !set_->lone) meet();
    }

    void turn_row(const Layer& layer, float* qkv, std::int64_t position) const {
        const std::int64_t e = rules_.head_dim, keys = rules_.heads, end = keys + rules_.kv_heads;
        if (rules_.qk_norm == QkNorm::all) {
            float* const k = qkv + rules_.query_width();
            rows_.normalise(layer.q_norm, qkv, qkv, rules_.query_width());
            rows_.normalise(layer.k_norm, k, k, rules_.key_width());
        }
        const float* const angles =
            layer.rope < 0 ? nullptr : chunk_.angles[layer.rope] + position * layer.rope_dim;
        for (std::int64_t h = 0; h < end; ++h) {
            float* const head = qkv + h * e;
            if (rules_.qk_norm == QkNorm::head)
                rows_.normalise(h < keys ? layer.q_norm : layer.k_norm, head, head, e);
            if (angles) rows_.rotate(head, angles, layer.rope_dim / 2);
        }
    }

    float* qkv(std::int64_t i) const {
        return (kept_ ? mine_.qkv : shared_.qkv) + i * rules_.qkv_width();
    }

    void append(std::int64_t slot, std::int64_t i, std::int64_t head) const {
        const Row& at = chunk_.rows[static_cast<std::size_t>(row(i))];
        const float* const key = qkv(i) + rules_.query_width() + head * rules_.head_dim;
        model_.attention_kernels->append(chunk_.cache->shape(),
                                         chunk_.cache->pages(at.sequence, slot), head, at.position,
                                         key, key + rules_.key_width());
    }

    void attend(const Layer& layer, std::int64_t slot) {
        const AttentionItem* held = nullptr;  // until it is known what follows
        const auto visit = [&](const AttentionItem& item) {
            if (held) attend_item(layer, slot, *held, span(slot, item));
            held = &item;
        };
        if (set_->size() < kManyRows)
            each_fair_item(layer.window, visit);
        else
            queue_->take(static_cast<std::int64_t>(set_->items.size()), 1,
                         [&](std::int64_t begin, std::int64_t) {
                             visit(set_->items[static_cast<std::size_t>(begin)]);
                         });
        ++queue_;
        if (held) attend_item(layer, slot, *held, {});
        mark(Part::attention);
    }

    // Shares out the items by the positions that they read. To claim them one by one would cost
    // as much as a short one.
    template <class Visit>
    void each_fair_item(std::int64_t window, const Visit& visit) const {
        const auto cost = [&](const AttentionItem& item) {
            const std::int64_t oldest = window ? item.position + 1 - window : 0;
            const std::int64_t seen = item.end - std::max(item.begin, oldest);
            return kItemPositions + std::max<std::int64_t>(seen, 0);
        };
        std::int64_t total = 0, before = 0;
        for (const AttentionItem& item : set_->items) total += cost(item);
        for (const AttentionItem& item : set_->items) {
            if (before * threads_ / total == thread_) visit(item);
            before += cost(item);
        }
    }

    Span span(std::int64_t slot, const AttentionItem& item) const {
        return {chunk_.cache->pages(item.sequence, slot), item.head, item.begin, item.end};
    }

    void attend_item(const Layer& layer, std::int64_t slot, const AttentionItem& item,
                     const Span& next) const {
        const Rules& r = rules_;
        const std::int64_t group = r.heads / r.kv_heads, offset = item.head * group * r.head_dim;
        if (set_->lone && item.span + 1 == item.spans) append(slot, item.first, item.head);
        const Queries queries{qkv(item.first) + offset, r.qkv_width(), item.count,
                              group, item.position, layer.window,
                              r.attention_scale, r.attention_softcap};
        Attended to{shared_.attended + item.first * r.query_width() + offset, r.query_width(),
                    nullptr, nullptr};
        if (item.spans > 1) {
            const std::int64_t at = item.first * kMaxSpans + item.span;
            to = {shared_.mixed + at * r.query_width() + offset, 0,
                  shared_.peaks + at * r.heads + item.head * group,
                  shared_.totals + at * r.heads + item.head * group};
        }
        model_.attention_kernels->attend(chunk_.cache->shape(), span(slot, item), next, queries, to,
                                         mine_.attention);
        if (rounded_)
            layer.o_input.write_columns(attended_forms(), set_->size(), item.first,
                                        shared_.attended + item.first * r.query_width(),
                                        r.query_width(), item.count, offset,
                                        offset + group * r.head_dim);
    }

    bool rounds_heads(const Input& input) const {
        const std::int64_t grain = input.grain(), width = rules_.query_width() / rules_.kv_heads;
        return set_->size() < kManyRows && !set_->split && grain && width % grain == 0;
    }

    // Joins the spans of attention and writes the outcome as the output matmul wants it.
    void mix(const Input& input) {
        const std::int64_t width = rules_.query_width();
        each_unit([&](std::int64_t i, std::int64_t count) {
            const float* from = shared_.attended + i * width;
            for (std::int64_t r = 0; set_->split && r < count; ++r) {
                float* const staged = mine_.staged + r * width;
                if (set_->spans[static_cast<std::size_t>(i + r)] > 1)
                    join(i + r, staged);
                else
                    std::copy(from + r * width, from + (r + 1) * width, staged);
            }
            input.write(attended_forms(), set_->size(), i, set_->split ? mine_.staged : from, width,
                        count, mine_.spare);
        });
        mark(Part::mix);
        settle_rows();
    }

    void join(std::int64_t i, float* out) const {
        const std::int64_t at = i * kMaxSpans;
        model_.attention_kernels->combine(
            shared_.mixed + at * rules_.query_width(), shared_.peaks + at * rules_.heads,
            shared_.totals + at * rules_.heads, rules_.heads,
            set_->spans[static_cast<std::size_t>(i)], rules_.head_dim, mine_.attention, out);
    }

    void activate(std::int64_t begin, std::int64_t end) {
        mark(Part::up);
        columns(begin, end, rules_.ffn, [&](std::int64_t i, std::int64_t at, std::int64_t n) {
            float* const up = shared_.up + i * rules_.up_stride() + at;
            rows_.activate(rules_.activation, rules_.gated ? up + rules_.ffn : nullptr, up, n);
        });
    }

    // call(row, column, n) for the columns of tiles begin..end-1, `width` in all, in each row.
    template <class Call>
    void columns(std::int64_t begin, std::int64_t end, std::int64_t width, const Call& call) const {
        const std::int64_t first = begin * kTileRows, last = std::min(end * kTileRows, width);
        for (std::int64_t i = 0; i < set_->size(); ++i) call(i, first, last - first);
    }

    // after(begin, end) follows each piece of tiles, a multiple of `unit` or the last; of a few
    // rows while the first-level cache holds the outputs.
    template <class After>
    void multiply(const Product& product, const Input& input, std::uint8_t* forms, float* y,
                  std::int64_t stride, Part part, std::int64_t unit, const After& after) {
        const std::int64_t m = set_->size();
        const std::int64_t step = w4::ceil_div(product.step(input, m, planned_), unit) * unit;
        const std::int64_t units = kNearBytes / (m * kTileRows * 8) / unit;  // of two floats each
        const std::int64_t piece =
            m > 1 && m < kManyRows ? std::max<std::int64_t>(units, 1) * unit : step;
        queue_++->take(product.tiles(), step, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t i = begin; i < end; i += piece) {
                const std::int64_t last = std::min(i + piece, end);
                product.run(input, forms, m, y, stride, i, last, mine_.unpacked);
                after(i, last);
            }
        });
        mark(part);
    }
    void multiply(const Product& product, const Input& input, std::uint8_t* forms, float* y,
                  std::int64_t stride, Part part) {
        multiply(product, input, forms, y, stride, part, 1, [](std::int64_t, std::int64_t) {});
    }

    // call(first, count) for this thread's share of the set's rows, one or a panel at a time. They
    // lie together, since the keys of neighbouring positions share cache lines.
    template <class Call>
    void each_share(const Call& call) const {
        const std::int64_t m = set_->size(), unit = m < kManyRows ? 1 : kPanelRows;
        const std::int64_t units = w4::ceil_div(m, unit);
        const std::int64_t end = std::min(m, units * (thread_ + 1) / threads_ * unit);
        for (std::int64_t i = units * thread_ / threads_ * unit; i < end; i += unit)
            call(i, std::min(unit, end - i));
    }
    // The same, or for all of them where each thread keeps them.
    template <class Call>
    void each_unit(const Call& call) const {
        if (kept_) return call(std::int64_t{0}, set_->size());
        each_share(call);
    }

    void settle_rows() {
        if (!kept_) meet();
    }
    void meet() {
        barrier_.wait(threads_);
        mark(Part::wait);
    }
    void mark(Part part) {
        if (!times_) return;
        const auto now = std::chrono::steady_clock::now();
        times_->seconds[static_cast<int>(part)] += std::chrono::duration<double>(now - last_).count();
        last_ = now;
    }

    std::int32_t row(std::int64_t i) const { return set_->rows[static_cast<std::size_t>(i)]; }
    float* stream(std::int32_t row) const {
        return (kept_ ? mine_.x : shared_.x) + row * rules_.hidden;
    }
    std::uint8_t* hidden_forms() const { return kept_ ? mine_.hidden_forms : shared_.hidden_forms; }
    std::uint8_t* attended_forms() const {
        return kept_ && !rounded_ ? mine_.attended_forms : shared_.attended_forms;
    }
    static const Norm* present(const Norm& norm) { return norm.weight ? &norm : nullptr; }

    const Model& model_;
    const Rules& rules_;
    const RowKernels& rows_;
    const Chunk& chunk_;
    const Buffers& shared_;
    const Mine mine_;
    Queue* queue_;
    Barrier& barrier_;
    const int thread_, threads_, planned_;
    const bool kept_;  // every thread has all rows for itself
    const RowSet* set_ = nullptr;
    bool rounded_ = false;  // attention writes the output matmul's input itself
    Pending pending_;
    Times* const times_;
    std::chrono::steady_clock::time_point last_;
};

}  // namespace

Model::Model(const Rules& rules, Isa isa)
    : rules(rules), kernels(&shallow::kernels(isa)), row_kernels(&shallow::row_kernels(isa)),
      attention_kernels(&shallow::attention_kernels(isa, rules.mode == Mode::int8)), final_norm{},
      head_input(*kernels, rules.mode, true), embedding_rows(nullptr), embedding_type{} {}

void Model::embed(std::int64_t token, float* x) const {
    if (embedding) return read_row(*embedding, token, x);
    const std::int64_t n = rules.hidden;
    if (embedding_type == ScaleType::float32) {
        std::memcpy(x, static_cast<const float*>(embedding_rows) + token * n,
                    static_cast<std::size_t>(n) * sizeof(float));
        return;
    }
    const auto* const row = static_cast<const std::uint16_t*>(embedding_rows) + token * n;
    for (std::int64_t i = 0; i < n; ++i)
        x[i] = embedding_type == ScaleType::float16 ? w4::half_to_float(row[i])
                                                    : w4::bfloat_to_float(row[i]);
}

void RowSet::add_items(const std::vector<Row>& chunk, const Model& model) {
    const Rules& rules = model.rules;
    const std::int64_t queries = std::max<std::int64_t>(
        1, model.attention_kernels->query_rows * rules.kv_heads / rules.heads);
    items.clear();
    spans.assign(rows.size(), 1);
    split = false;
    lone = true;
    for (std::int64_t last = size(); last > 0;) {  // the longest work first
        const auto at = [&](std::int64_t i) -> const Row& {
            return chunk[static_cast<std::size_t>(rows[static_cast<std::size_t>(i)])];
        };
        std::int64_t first = last - 1;
        while (first > 0 && at(first - 1).sequence == at(last - 1).sequence) --first;
        const std::int64_t context = at(last - 1).position + 1;
        const std::int64_t share = w4::ceil_div(w4::ceil_div(context, kMaxSpans), kPage) * kPage;
        const std::int64_t span = last - first == 1 ? share : context;
        lone &= last - first == 1;
        const std::int64_t count = w4::ceil_div(context, span);
        if (count > 1) spans[static_cast<std::size_t>(first)] = static_cast<std::int32_t>(count), split = true;
        for (std::int64_t end = last; end > first; end -= std::min(queries, end - first)) {
            const std::int64_t begin = std::max(first, end - queries);
            for (std::int64_t s = count - 1; s >= 0; --s)
                for (std::int64_t g = 0; g < rules.kv_heads; ++g)
                    items.push_back({begin, end - begin, at(begin).sequence, at(begin).position, g, s,
                                     count, s * span,
                                     std::min((s + 1) * span, at(end - 1).position + 1)});
        }
        last = first;
    }
}

std::size_t queues_needed(const Model& model) { return model.layers.size() * 5 + 1; }

std::int64_t workspace_bytes(const Model& model, const Chunk& chunk, int threads) {
    return Buffers(model, chunk, threads, nullptr).bytes;
}

void run_step(const Model& model, const Chunk& chunk, int threads, std::uint8_t* workspace,
              Queue* queues, Times* times) {
    const Buffers buffers(model, chunk, threads, workspace);
    for (std::size_t i = 0; i < queues_needed(model); ++i) queues[i].reset();
    Barrier barrier;
    Pool::instance().run(threads, [&](int thread, int count) {
        Worker(model, chunk, buffers, queues, barrier, thread, count, threads, times).run();
    });
}

}  // namespace shallow
