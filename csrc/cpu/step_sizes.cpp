#include "cpu/step_sizes.h"

#include <algorithm>

namespace shallow {
namespace {

RowSizes measured(const Model& model, std::int64_t m, int threads) {
    RowSizes sizes;
    sizes.hidden = model.head.input().nbytes(m);
    sizes.unpacked = model.head.scratch_bytes(m, threads);
    for (const Layer& layer : model.layers) {
        RowSizes one;
        one.hidden = std::max(layer.qkv.input().nbytes(m), layer.up.input().nbytes(m));
        one.attended = layer.o.input().nbytes(m);
        one.up = layer.down.input().nbytes(m);
        for (const Product* product : {&layer.qkv, &layer.o, &layer.up, &layer.down})
            one.unpacked = std::max(one.unpacked, product->scratch_bytes(m, threads));
        sizes.include(one);
    }
    return sizes;
}

}  // namespace

void RowSizes::include(const RowSizes& other) {
    hidden = std::max(hidden, other.hidden);
    attended = std::max(attended, other.attended);
    up = std::max(up, other.up);
    unpacked = std::max(unpacked, other.unpacked);
}

const RowSizes& Sizes::of(const Model& model, std::int64_t m, int threads) {
    if (layers_ != model.layers.size()) {
        known_.clear();
        layers_ = model.layers.size();
    }
    const auto found = known_.find(m);
    if (found != known_.end()) return found->second;
    return known_.emplace(m, measured(model, m, threads)).first->second;
}

}  // namespace shallow
