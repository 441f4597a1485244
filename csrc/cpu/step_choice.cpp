#include "cpu/step_choice.h"

#include <cmath>

namespace shallow {
namespace {

// Not where the bound is not known, or beyond what a float holds.
bool falls_short(float bound, float of) { return bound < of && std::isfinite(bound); }

// The largest of the row's logits: first of the tile with the highest bound, then of each whose bound
// does not fall short of what was met. The next tile is on its way meanwhile.
Best largest(const Worker& worker, std::int64_t m, std::int64_t row, const float* bounds) {
    const Product& head = worker.model.head;
    const FloatRows logits{worker.chunk.logits, worker.rules.vocab};
    const std::int64_t tiles = head.tiles();
    Best best;
    const auto meet = [&](std::int64_t tile) {
        head.run_row(worker.hidden_forms, m, row, logits, tile);
        const std::int64_t end = std::min((tile + 1) * kTileRows, worker.rules.vocab);
        for (std::int64_t column = tile * kTileRows; column < end; ++column)
            best.meet({logits.row(row)[column], column});
    };
    const std::int64_t first =
        std::max<std::int64_t>(worker.model.row_kernels.largest(bounds, tiles), 0);
    meet(first);
    const auto next = [&](std::int64_t tile) {
        while (tile < tiles && (tile == first || falls_short(bounds[tile], best.value))) ++tile;
        return tile;
    };
    for (std::int64_t tile = next(0); tile < tiles && !std::isnan(best.value);) {
        const std::int64_t after = next(tile + 1);
        if (after < tiles) head.fetch(after);
        if (!falls_short(bounds[tile], best.value)) meet(tile);
        tile = after;
    }
    return best;
}

}  // namespace

void choose_likeliest(Worker& worker, std::int64_t m) {
    const Product& head = worker.model.head;
    const FloatRows bounds{worker.chunk.bounds, head.tiles()};
    worker.take_shares(head.tiles(), m, head, [&](std::int64_t begin, std::int64_t end) {
        head.bound(worker.hidden_forms, m, bounds, begin, end);
    });
    worker.mark(Part::head);
    worker.barrier();
    worker.next_queue().take(m, 1, [&](std::int64_t row, std::int64_t) {
        worker.chunk.best[worker.thread * m + row] = largest(worker, m, row, bounds.row(row));
    });
    worker.mark(Part::head);
}

}  // namespace shallow
