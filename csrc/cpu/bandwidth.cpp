#include "cpu/bandwidth.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cpu/bindings.h"
#include "cpu/features.h"
#include "cpu/pages.h"
#include "cpu/threads.h"

namespace shallow {

typedef uint64_t Vector __attribute__((vector_size(16)));

uint64_t sum_words_generic(const void* data, size_t bytes) {
    return sum_words<Vector>(data, bytes);
}

namespace {

using Clock = std::chrono::steady_clock;

uint64_t sum_words_fastest(const void* data, size_t bytes) {
#if defined(SHALLOW_X86)
    if (features().avx2) return sum_words_avx2(data, bytes);
#endif
    return sum_words_generic(data, bytes);
}

struct Pass {  // from the first thread's start to the last one's end
    Clock::time_point start = Clock::time_point::max(), end = Clock::time_point::min();
};

double read_bandwidth(int64_t bytes, int threads, int passes) {
    constexpr int64_t kUnit = 4096;
    if (threads < 1 || passes < 1 || bytes < threads * kUnit)
        throw std::invalid_argument(
            "read_bandwidth needs a thread, a pass and 4096 bytes a thread, found bytes=" +
            std::to_string(bytes) + ", threads=" + std::to_string(threads) +
            ", passes=" + std::to_string(passes));
    const Pages pages(static_cast<size_t>(bytes));
    std::vector<Pass> timed(static_cast<size_t>(passes));
    std::mutex mutex;
    std::atomic<int64_t> arrived{0};
    std::atomic<uint64_t> bytes_read{0}, sum{0};

    Pool::instance().run(threads, [&](int thread, int count) {
        const size_t share = static_cast<size_t>(bytes / count / kUnit * kUnit);
        char* const mine = static_cast<char*>(pages.data()) + share * static_cast<size_t>(thread);
        std::memset(mine, 1, share);  // pages that nothing was written to are all one page
        int64_t expected = 0;
        for (Pass& pass : timed) {
            ++arrived;
            expected += count;
            while (arrived < expected) std::this_thread::yield();
            const auto start = Clock::now();
            sum += sum_words_fastest(mine, share);
            const auto end = Clock::now();
            const std::lock_guard lock(mutex);
            pass = {std::min(pass.start, start), std::max(pass.end, end)};
        }
        bytes_read += share;
    });

    if (sum != 0x0101010101010101 * (bytes_read / 8 * static_cast<uint64_t>(passes)))
        throw std::runtime_error("read_bandwidth did not read what it had written");
    auto best = Clock::duration::max();
    for (const Pass& pass : timed) best = std::min(best, pass.end - pass.start);
    return static_cast<double>(bytes_read) / std::chrono::duration<double>(best).count() / 1e9;
}

}  // namespace
}  // namespace shallow

void bind_bandwidth(pybind11::module_& m) {
    namespace py = pybind11;
    m.def("read_bandwidth", shallow::read_bandwidth, py::arg("bytes"), py::arg("threads"),
          py::arg("passes") = 8, py::call_guard<py::gil_scoped_release>(),
          "GB/s (1e9) at which `threads` threads, at most the CPUs of this process, read `bytes`\n"
          "bytes of memory in huge pages where there are any: the best of `passes` passes.");
}
