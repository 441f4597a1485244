#include "cpu/bandwidth.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cpu/bindings.h"
#include "cpu/features.h"
#include "cpu/pages.h"

namespace shallow {

typedef uint64_t Vector __attribute__((vector_size(16)));

uint64_t sum_words_generic(const void* data, size_t bytes) {
    return sum_words<Vector>(data, bytes);
}

namespace {

using SumWords = uint64_t (*)(const void*, size_t);
using Clock = std::chrono::steady_clock;

SumWords fastest() {
#if defined(SHALLOW_X86)
    if (features().avx2) return sum_words_avx2;
#endif
    return sum_words_generic;
}

struct Interval {
    Clock::time_point start, end;
};

// Seconds from the first thread's start to the last one's end.
double span(const Interval* begin, const Interval* end) {
    auto start = begin->start, stop = begin->end;
    for (; begin != end; ++begin) {
        start = std::min(start, begin->start);
        stop = std::max(stop, begin->end);
    }
    return std::chrono::duration<double>(stop - start).count();
}

// Every thread reads its own contiguous share; they start each pass together. Returns the best.
double read_bandwidth(int64_t bytes, int threads, int passes) {
    constexpr int64_t kUnit = 4096;
    if (threads < 1 || threads > 1024 || passes < 1 || bytes < threads * kUnit)
        throw std::invalid_argument(
            "read_bandwidth needs 1 to 1024 threads, a pass and 4096 bytes a thread, got bytes=" +
            std::to_string(bytes) + ", threads=" + std::to_string(threads) +
            ", passes=" + std::to_string(passes));
    const size_t share = static_cast<size_t>(bytes / threads / kUnit * kUnit);
    const Pages pages(share * static_cast<size_t>(threads));
    const SumWords sum_words = fastest();
    std::vector<Interval> intervals(static_cast<size_t>(passes) * static_cast<size_t>(threads));
    std::atomic<int64_t> arrived{0};
    std::atomic<uint64_t> total{0};

    const auto read = [&](int thread) {
        char* const mine = static_cast<char*>(pages.data()) + share * static_cast<size_t>(thread);
        std::memset(mine, 1, share);  // pages that nothing was written to are all one page
        for (int pass = 0; pass < passes; ++pass) {
            ++arrived;
            while (arrived < int64_t{threads} * (pass + 1)) std::this_thread::yield();
            Interval& interval = intervals[static_cast<size_t>(pass * threads + thread)];
            interval.start = Clock::now();
            total += sum_words(mine, share);
            interval.end = Clock::now();
        }
    };
    std::vector<std::thread> others;
    for (int thread = 1; thread < threads; ++thread) others.emplace_back(read, thread);
    read(0);
    for (std::thread& other : others) other.join();

    const uint64_t expected = uint64_t{0x0101010101010101} * (share / 8 * threads * passes);
    if (total != expected) throw std::runtime_error("read_bandwidth read what it did not write");
    double best = span(&intervals[0], &intervals[0] + threads);
    for (int pass = 1; pass < passes; ++pass) {
        const Interval* const begin = &intervals[0] + pass * threads;
        best = std::min(best, span(begin, begin + threads));
    }
    return static_cast<double>(share) * threads / best / 1e9;
}

}  // namespace
}  // namespace shallow

void bind_bandwidth(pybind11::module_& m) {
    namespace py = pybind11;
    m.def("read_bandwidth", shallow::read_bandwidth, py::arg("bytes"), py::arg("threads"),
          py::arg("passes") = 8, py::call_guard<py::gil_scoped_release>(),
          "GB/s (1e9) at which `threads` threads read `bytes` bytes: the best of `passes` passes.");
}
