#include "cpu/step_attention.h"

namespace shallow {
namespace {

constexpr std::int64_t kItemPositions = 32;  // that cost as much as an item of attention itself

}  // namespace

StepAttention::StepAttention(Worker& worker, const Layer& layer, std::int64_t slot,
                             const RowSet& set)
    : w_(worker), rules_(worker.rules), layer_(layer), slot_(slot), set_(set),
      rounds_heads_(rounds_heads()),
      forms_(worker.kept && !rounds_heads_ ? worker.own.attended_forms
                                           : worker.shared.attended_forms) {}

bool StepAttention::rounds_heads() const {
    const std::int64_t grain = layer_.o.input().grain();
    const std::int64_t width = rules_.query_width() / rules_.kv_heads;
    return set_.size() < kManyRows && !set_.split && grain && width % grain == 0;
}

void StepAttention::fetch() const {
    if (set_.size() >= kManyRows) return;
    Span first{};
    each_fair_item([&](const AttentionItem& item) {
        if (first.begin >= first.end) first = span(item);
    });
    if (first.begin < first.end) w_.model.attention_kernels.fetch(w_.chunk.cache->shape(), first);
}

std::uint8_t* StepAttention::run() {
    rotate();
    attend();
    w_.barrier();
    if (!rounds_heads_) combine();
    return forms_;
}

// Normalises and rotates queries and keys; stores keys and values unless attention does.
void StepAttention::rotate() {
    const std::int64_t width = rules_.qkv_width();
    w_.each_share_or_kept(set_.size(), [&](std::int64_t i, std::int64_t count) {
        for (std::int64_t r = i; r < i + count; ++r) {
            if (w_.kept) std::copy_n(w_.shared.qkv.row(r), width, w_.qkv.row(r));
            rotate_row(w_.qkv.row(r), set_.row(w_.chunk.rows, r).position);
            if (set_.lone || (w_.kept && r % w_.threads != w_.thread)) continue;
            for (std::int64_t g = 0; g < rules_.kv_heads; ++g) append(r, g);
        }
    });
    w_.mark(Part::rope);
    if (!w_.kept || !set_.lone) w_.barrier();
}

void StepAttention::rotate_row(float* qkv, std::int64_t position) const {
    const RowKernels& kernels = w_.model.row_kernels;
    const std::int64_t e = rules_.head_dim, keys = rules_.heads, end = keys + rules_.kv_heads;
    if (rules_.qk_norm == QkNorm::all) {
        float* const k = qkv + rules_.query_width();
        kernels.normalise(layer_.q_norm, qkv, qkv, rules_.query_width());
        kernels.normalise(layer_.k_norm, k, k, rules_.key_width());
    }
    const float* const angles =
        layer_.rope < 0 ? nullptr : w_.chunk.angles[layer_.rope] + position * layer_.rope_dim;
    for (std::int64_t h = 0; h < end; ++h) {
        float* const head = qkv + h * e;
        if (rules_.qk_norm == QkNorm::head)
            kernels.normalise(h < keys ? layer_.q_norm : layer_.k_norm, head, head, e);
        if (angles) kernels.rotate(head, angles, layer_.rope_dim / 2);
    }
}

void StepAttention::append(std::int64_t row, std::int64_t head) const {
    const Row& at = set_.row(w_.chunk.rows, row);
    const KvCache& cache = *w_.chunk.cache;
    const float* const key = w_.qkv.row(row) + rules_.query_width() + head * rules_.head_dim;
    w_.model.attention_kernels.append(cache.shape(), cache.pages(at.sequence, slot_), head,
                                      at.position, key, key + rules_.key_width());
}

void StepAttention::attend() {
    const AttentionItem* held = nullptr;  // until it is known what follows
    const auto visit = [&](const AttentionItem& item) {
        if (held) attend_item(*held, span(item));
        held = &item;
    };
    Queue& queue = w_.next_queue();
    if (set_.size() < kManyRows)
        each_fair_item(visit);
    else
        queue.take(static_cast<std::int64_t>(set_.items.size()), 1,
                   [&](std::int64_t begin, std::int64_t) {
                       visit(set_.items[static_cast<std::size_t>(begin)]);
                   });
    if (held) attend_item(*held, {});
    w_.mark(Part::attention);
}

// Shares out the items by the positions that they read, each to the thread of its middle. Claimed
// one by one they cost a decode at 1,024 tokens 1.6 % of its step, a batch of 8 1.4 %
// (benchmarks/results/decoder.md).
template <class Visit>
void StepAttention::each_fair_item(const Visit& visit) const {
    const auto cost = [&](const AttentionItem& item) {
        const std::int64_t seen = item.end - std::max(item.begin, oldest(item));
        return kItemPositions + std::max<std::int64_t>(seen, 0);
    };
    std::int64_t total = 0, before = 0;
    for (const AttentionItem& item : set_.items) total += cost(item);
    for (const AttentionItem& item : set_.items) {
        const std::int64_t middle = 2 * before + cost(item);
        if (middle * w_.threads / (2 * total) == w_.thread) visit(item);
        before += cost(item);
    }
}

void StepAttention::attend_item(const AttentionItem& item, const Span& next) const {
    const std::int64_t width = rules_.query_width() / rules_.kv_heads, column = item.head * width;
    if (set_.lone && item.span + 1 == item.spans) append(item.first, item.head);
    w_.model.attention_kernels.attend(w_.chunk.cache->shape(), span(item), next, queries(item),
                                      target(item), w_.own.attention);
    if (rounds_heads_)
        layer_.o.input().write_columns(
            w_.shared.attended.part(item.first, item.count, column, column + width), forms_,
            set_.size(), item.first, column);
}

Queries StepAttention::queries(const AttentionItem& item) const {
    Queries queries;
    queries.heads = rules_.heads / rules_.kv_heads;
    queries.data = w_.qkv.row(item.first) + item.head * queries.heads * rules_.head_dim;
    queries.stride = w_.qkv.stride;
    queries.count = item.count;
    queries.position = item.position;
    queries.window = layer_.window;
    queries.scale = rules_.attention_scale;
    queries.softcap = rules_.attention_softcap;
    return queries;
}

Attended StepAttention::target(const AttentionItem& item) const {
    const std::int64_t head = item.head * (rules_.heads / rules_.kv_heads);
    const std::int64_t column = head * rules_.head_dim;
    Attended to{};
    if (item.spans > 1) {
        const std::int64_t at = item.first * kMaxSpans + item.span;
        to.data = w_.shared.partial + at * rules_.query_width() + column;
        to.peaks = w_.shared.peaks + at * rules_.heads + head;
        to.totals = w_.shared.totals + at * rules_.heads + head;
    } else {
        to.data = w_.shared.attended.row(item.first) + column;
        to.stride = w_.shared.attended.stride;
    }
    return to;
}

// The first position that any of its queries sees.
std::int64_t StepAttention::oldest(const AttentionItem& item) const {
    return layer_.window ? std::max<std::int64_t>(0, item.position + 1 - layer_.window) : 0;
}

// From the page on in which its queries see anything.
Span StepAttention::span(const AttentionItem& item) const {
    Span span;
    span.pages = w_.chunk.cache->pages(item.sequence, slot_);
    span.head = item.head;
    span.begin = std::max(item.begin, oldest(item) / kPage * kPage);
    span.end = item.end;
    return span;
}

// Combines the spans of split attention (flash decoding) and writes the result as the input of `o`.
void StepAttention::combine() {
    const std::int64_t width = rules_.query_width();
    const FloatRows& attended = w_.shared.attended;
    const FloatRows staged{w_.own.staged, width};
    w_.each_share_or_kept(set_.size(), [&](std::int64_t i, std::int64_t count) {
        for (std::int64_t r = 0; set_.split && r < count; ++r) {
            if (set_.spans[static_cast<std::size_t>(i + r)] > 1)
                combine_spans(i + r, staged.row(r));
            else
                std::copy_n(attended.row(i + r), width, staged.row(r));
        }
        const Rows from =
            set_.split ? staged.part(0, count, 0, width) : attended.part(i, count, 0, width);
        layer_.o.input().write(from, forms_, set_.size(), i, w_.own.spare);
    });
    w_.mark(Part::combine);
    w_.barrier_unless_kept();
}

void StepAttention::combine_spans(std::int64_t row, float* out) const {
    const std::int64_t at = row * kMaxSpans;
    w_.model.attention_kernels.combine(
        w_.shared.partial + at * rules_.query_width(), w_.shared.peaks + at * rules_.heads,
        w_.shared.totals + at * rules_.heads, rules_.heads,
        set_.spans[static_cast<std::size_t>(row)], rules_.head_dim, w_.own.attention, out);
}

void RowSet::add_items(const std::vector<Row>& chunk, const Model& model) {
    const std::int64_t kv_heads = model.rules.kv_heads;
    const std::int64_t queries = std::max<std::int64_t>(
        1, model.attention_kernels.query_rows * kv_heads / model.rules.heads);
    items.clear();
    spans.assign(members.size(), 1);
    split = false;
    lone = true;
    for (std::int64_t last = size(); last > 0;) {  // the longest work first
        std::int64_t first = last - 1;
        while (first > 0 && row(chunk, first - 1).sequence == row(chunk, last - 1).sequence)
            --first;
        const std::int64_t context = row(chunk, last - 1).position + 1;
        const std::int64_t share = w4::ceil_div(w4::ceil_div(context, kMaxSpans), kPage) * kPage;
        const std::int64_t span = last - first == 1 ? share : context;
        lone &= last - first == 1;
        AttentionItem item;
        item.spans = w4::ceil_div(context, span);
        if (item.spans > 1) {
            spans[static_cast<std::size_t>(first)] = static_cast<std::int32_t>(item.spans);
            split = true;
        }
        for (std::int64_t end = last; end > first; end = item.first) {
            item.first = std::max(first, end - queries);
            item.count = end - item.first;
            item.sequence = row(chunk, item.first).sequence;
            item.position = row(chunk, item.first).position;
            // Head by head: the short last spans, all at first, went to one thread.
            for (item.head = 0; item.head < kv_heads; ++item.head)
                for (item.span = item.spans - 1; item.span >= 0; --item.span) {
                    item.begin = item.span * span;
                    item.end = std::min(item.begin + span, row(chunk, end - 1).position + 1);
                    items.push_back(item);
                }
        }
        last = first;
    }
}

}  // namespace shallow
