#include "cpu/step_products.h"

namespace shallow {
namespace {

// Of L1, for outputs that are to be activated. A batch of 8 is 1.5 % faster by it than by whole
// claims (benchmarks/results/decoder.md); fewer rows take these, which streams divide.
constexpr std::int64_t kNearBytes = 16 << 10;

// after(begin, end) follows each piece of tiles, a multiple of `unit` or the last; of a few rows
// while the first-level cache holds the outputs.
template <class After>
void multiply_then(Worker& worker, const Product& product, std::uint8_t* forms, std::int64_t m,
                   const FloatRows& y, Part part, std::int64_t unit, const After& after) {
    const std::int64_t tiles = product.tiles(), claim = product.claim(m, worker.planned);
    const std::int64_t near = kNearBytes / (m * kTileRows * 8) / unit;  // of two floats each
    const std::int64_t piece =
        m > kStreamedRows && m < kManyRows ? std::max<std::int64_t>(near, 1) * unit : tiles;
    const auto run = [&](std::int64_t begin, std::int64_t end) {
        const std::int64_t behind = std::min(end * unit, tiles);
        for (std::int64_t i = begin * unit; i < behind; i += piece) {
            const std::int64_t last = std::min(i + piece, behind);
            product.run(forms, m, y, i, last, worker.own.unpacked);
            after(i, last);
        }
    };
    const std::int64_t units = w4::ceil_div(tiles, unit);
    if (claim)
        worker.next_queue().take(units, w4::ceil_div(claim, unit), run);
    else
        worker.take_shares(units, m, product, run);
    worker.mark(part);
}

std::int64_t shared_grain(const Worker& worker, const Layer& layer, std::int64_t m) {
    const std::int64_t grain = m < kManyRows ? layer.down.input().grain() : 0;
    return grain * worker.planned * 4 > worker.rules.ffn ? 0 : grain;
}

}  // namespace

void multiply(Worker& worker, const Product& product, std::uint8_t* forms, std::int64_t m,
              const FloatRows& y, Part part) {
    multiply_then(worker, product, forms, m, y, part, 1, [](std::int64_t, std::int64_t) {});
}

FeedForward::FeedForward(Worker& worker, const Layer& layer, const RowSet& set)
    : w_(worker), layer_(layer), m_(set.size()), grain_(shared_grain(worker, layer, set.size())) {}

void FeedForward::write_activated() {
    const FloatRows& up = w_.shared.up;
    multiply_then(w_, layer_.up, w_.hidden_forms, m_, up, Part::up,
                  std::max<std::int64_t>(grain_ / kTileRows, 1),
                  [&](std::int64_t first, std::int64_t last) {
                      w_.mark(Part::up);
                      const std::int64_t begin = first * kTileRows;
                      const std::int64_t end = std::min(last * kTileRows, w_.rules.ffn);
                      activate(begin, end);
                      if (grain_)
                          layer_.down.input().write_columns(up.part(0, m_, begin, end),
                                                            w_.shared.up_forms, m_, 0, begin);
                      w_.mark(Part::activate);
                  });
}

void FeedForward::activate(std::int64_t begin, std::int64_t end) const {
    for (std::int64_t i = 0; i < m_; ++i) {
        float* const up = w_.shared.up.row(i) + begin;
        const float* const gate = w_.rules.gated ? up + w_.rules.ffn : nullptr;
        w_.model.row_kernels.activate(w_.rules.activation, gate, up, end - begin);
    }
}

void FeedForward::write_down(const FloatRows& y) {
    if (!grain_) write_input_of_down();
    multiply(w_, layer_.down, w_.shared.up_forms, m_, y, Part::down);
}

void FeedForward::write_input_of_down() {
    w_.each_share(m_, [&](std::int64_t i, std::int64_t count) {
        layer_.down.input().write(w_.shared.up.part(i, count, 0, w_.rules.ffn), w_.shared.up_forms,
                                  m_, i, w_.own.spare);
    });
    w_.mark(Part::norm);
    w_.barrier();
}

void write_logits(Worker& worker, std::int64_t m) {
    const std::int64_t vocab = worker.rules.vocab;
    const float cap = worker.rules.logit_softcap;
    const RowKernels& kernels = worker.model.row_kernels;
    const FloatRows logits{worker.chunk.logits, vocab};
    Best* const best = worker.chunk.best;
    const auto finish = [&](std::int64_t row, std::int64_t begin, std::int64_t end) {
        float* const some = logits.row(row) + begin;
        if (cap != 0) kernels.softcap(some, cap, end - begin);
        if (!best) return;
        const std::int64_t top = kernels.largest(some, end - begin);  // still in its caches
        best[worker.thread * m + row].meet({top < 0 ? NAN : some[top], begin + top});
    };
    multiply_then(worker, worker.model.head, worker.hidden_forms, m, logits, Part::head, 1,
                  [&](std::int64_t first, std::int64_t last) {
                      for (std::int64_t row = 0; (cap != 0 || best) && row < m; ++row)
                          finish(row, first * kTileRows, std::min(last * kTileRows, vocab));
                  });
}

}  // namespace shallow
