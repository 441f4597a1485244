#include "cpu/bandwidth.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>

#include "cpu/bindings.h"
#include "cpu/features.h"
#include "cpu/pages.h"
#include "cpu/released.h"
#include "cpu/threads.h"

namespace shallow {

typedef uint64_t Vector __attribute__((vector_size(16)));

uint64_t sum_words_generic(const void* data, size_t bytes, int streams) {
    return sum_words<Vector>(data, bytes, streams);
}

namespace {

using Clock = std::chrono::steady_clock;

uint64_t sum_words_fastest(const void* data, size_t bytes, int streams) {
#if defined(SHALLOW_X86)
    if (features().avx2) return sum_words_avx2(data, bytes, streams);
#endif
    return sum_words_generic(data, bytes, streams);
}

// Memory in huge pages where there are any, and the threads that read it.
class Reader {
public:
    Reader(int64_t bytes, int threads)
        : bytes_(bytes), threads_(threads), pages_(checked(bytes, threads)) {
        Pool::instance().run(threads_, [&](int thread, int count) {
            const size_t size = static_cast<size_t>(bytes_), part = size / count / kUnit * kUnit;
            const size_t begin = part * static_cast<size_t>(thread);
            // Written, since pages that nothing was written to are all one page.
            std::memset(data() + begin, 1, thread + 1 < count ? part : size - begin);
        });
        double few = 0, many = 0;
        for (int i = 0; i < kTries; ++i) {
            few = std::max(few, pass_in(kFewStreams));
            many = std::max(many, pass_in(kManyStreams));
        }
        streams_ = few > many ? kFewStreams : kManyStreams;
    }

    // GB/s of one pass, from the first thread's start to the last one's end.
    double pass() { return pass_in(streams_); }

private:
    static constexpr int64_t kUnit = 4096;
    static constexpr int kTries = 2;

    double pass_in(int streams) {
        auto start = Clock::time_point::max(), end = Clock::time_point::min();
        size_t bytes_read = 0;
        uint64_t sum = 0;
        std::mutex mutex;
        std::atomic<int> arrived{0};
        Pool::instance().run(threads_, [&](int thread, int count) {
            const size_t part = static_cast<size_t>(bytes_ / count / kUnit * kUnit);
            ++arrived;
            while (arrived < count) std::this_thread::yield();
            const auto mine = Clock::now();
            const uint64_t found = sum_words_fastest(data() + part * size_t(thread), part, streams);
            const auto done = Clock::now();
            const std::lock_guard lock(mutex);
            start = std::min(start, mine), end = std::max(end, done);
            sum += found, bytes_read += part;
        });
        if (sum != 0x0101010101010101 * (bytes_read / 8))
            throw std::runtime_error("read_bandwidth did not read what it had written");
        return static_cast<double>(bytes_read) /
               std::chrono::duration<double>(end - start).count() / 1e9;
    }

    static size_t checked(int64_t bytes, int threads) {
        if (threads < 1 || bytes < threads * kUnit)
            throw std::invalid_argument(
                "reading needs a thread and 4096 bytes a thread, found bytes=" +
                std::to_string(bytes) + ", threads=" + std::to_string(threads));
        return static_cast<size_t>(bytes);
    }
    char* data() const { return static_cast<char*>(pages_.data()); }

    int64_t bytes_;
    int threads_, streams_ = kFewStreams;
    Pages pages_;
};

double read_bandwidth(int64_t bytes, int threads, int passes) {
    if (passes < 1)
        throw std::invalid_argument("read_bandwidth needs a pass, found passes=" +
                                    std::to_string(passes));
    Reader reader(bytes, threads);
    double best = 0;
    for (int pass = 0; pass < passes; ++pass) best = std::max(best, reader.pass());
    return best;
}

}  // namespace
}  // namespace shallow

void bind_bandwidth(pybind11::module_& m) {
    namespace py = pybind11;
    using shallow::Reader;
    using release = py::call_guard<shallow::Released>;
    py::class_<Reader>(m, "Reader", "Memory that is read to find the bandwidth, time and again.")
        .def(py::init<int64_t, int>(), release(), py::arg("bytes"), py::arg("threads"))
        .def("gb_s", &Reader::pass, release(), "GB/s (1e9) of one pass over all bytes.");
    m.def("read_bandwidth", shallow::read_bandwidth, py::arg("bytes"), py::arg("threads"),
          py::arg("passes") = 8, release(),
          "GB/s (1e9) at which `threads` threads, at most the CPUs of this process, read `bytes`\n"
          "bytes of memory in huge pages where there are any: the best of `passes` passes.");
}
