// The loop whose rate is the peak of one instruction set, local to the including file.
#pragma once

#include <cstdint>
#include <utility>

#include "cpu/peak.h"

namespace shallow {
namespace {

// Each sum a variable of its own: those of an array the compiler keeps in memory too.
template <class Step, class... Sums>
std::int64_t add_up(std::int64_t rounds, Step step, Sums... sums) {
    for (std::int64_t i = 0; i < rounds; ++i) (step.add_product(sums), ...);
    return Step::word((... + sums));
}

// kPeakChains sums of products, which begin apart, or the compiler would see that all are one.
template <class Step, int... Chain>
std::int64_t run_chains(std::int64_t rounds, Step step, std::integer_sequence<int, Chain...>) {
    return add_up(rounds, step, Step::of_words(static_cast<int>(rounds) + Chain)...);
}
template <class Step>
std::int64_t run_chains(std::int64_t rounds) {
    return run_chains(rounds, Step(), std::make_integer_sequence<int, kPeakChains>());
}

}  // namespace
}  // namespace shallow
