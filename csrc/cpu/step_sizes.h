// What the rows of a step take of memory, by how many they are.
// defines: RowSizes Sizes
#pragma once

#include <cstdint>
#include <map>

#include "cpu/model.h"

namespace shallow {

// The most bytes that m rows take in each kind of form, and a thread for what it unpacks.
struct RowSizes {
    std::int64_t hidden = 0, attended = 0, up = 0, unpacked = 0;

    void include(const RowSizes& other);
};

// Remembers them: to ask every matrix of a model, none of which a cache still holds, took 10 to 50 us of
// each step (benchmarks/results/decoder.md).
class Sizes {
public:
    // Of a model that gains layers, and nothing else, between calls.
    const RowSizes& of(const Model& model, std::int64_t m, int threads);

private:
    std::size_t layers_ = 0;
    std::map<std::int64_t, RowSizes> known_;
};

}  // namespace shallow
