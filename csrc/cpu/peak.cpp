#include "cpu/peak.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <string>

#include "cpu/bindings.h"
#include "cpu/isa.h"
#include "cpu/released.h"
#include "cpu/threads.h"

namespace shallow {
namespace {

struct Probe {
    std::int64_t (*run)(std::int64_t rounds);
    std::int64_t ops;
};

Probe probe(Isa isa) {
#if defined(SHALLOW_X86)
    if (isa_supported(isa)) switch (isa) {
            case Isa::avx2: return {peak_avx2, kPeakOpsAvx2};
            case Isa::avxvnni: return {peak_avxvnni, kPeakOpsAvxvnni};
            case Isa::avx512: return {peak_avx512, kPeakOpsAvx512};
            case Isa::amx: return {peak_amx, kPeakOpsAmx};
            default: break;
        }
#endif
    throw std::invalid_argument(std::string("no int8 peak for ") + isa_name(isa) +
                                " on this processor");
}

// 1e9 operations a second of all threads together: the best of `passes` passes of about 10 ms.
double int8_peak(const std::string& isa, int threads, int passes) {
    using Clock = std::chrono::steady_clock;
    const Probe found = probe(isa_from_name(isa));
    if (passes < 1)
        throw std::invalid_argument("int8_peak needs a pass, found passes=" +
                                    std::to_string(passes));
    const std::int64_t rounds = 4'000'000'000 / found.ops;
    double best = 0;
    for (int pass = 0; pass < passes; ++pass) {
        std::atomic<std::int64_t> sink{0};
        Clock::time_point start;
        int ran = 1;
        Barrier ready;
        Pool::instance().run(threads, [&](int thread, int count) {
            sink += found.run(rounds / 16);
            ready.wait(count);
            if (thread == 0) start = Clock::now(), ran = count;
            sink += found.run(rounds);
        });
        const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
        best = std::max(best, static_cast<double>(rounds * found.ops * ran) / seconds / 1e9);
    }
    return best;
}

}  // namespace
}  // namespace shallow

void bind_peak(pybind11::module_& m) {
    namespace py = pybind11;
    m.def("int8_peak", shallow::int8_peak, py::arg("isa"), py::arg("threads"),
          py::arg("passes") = 8, py::call_guard<shallow::Released>(),
          "1e9 int8 multiplications and additions a second that `isa` does from registers alone.");
}
