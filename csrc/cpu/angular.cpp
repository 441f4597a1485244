#include "cpu/angular.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <thread>
#include <vector>

#include "cpu/bindings.h"
#include "cpu/features.h"

namespace shallow {
namespace {

using Kernel = void (*)(const AngularJob&, int64_t, int64_t, double*);

Kernel choose(const std::string& isa) {
#if defined(__x86_64__)
    const Features& f = features();
    const bool avx512 = f.avx512f && f.avx512dq && f.avx512bw && f.avx512vl;
    if (avx512 && (isa.empty() || isa == "avx512")) return angular_avx512;
    if (f.avx2 && f.fma && f.f16c && (isa.empty() || isa == "avx2")) return angular_avx2;
#endif
    if (isa.empty() || isa == "generic") return angular_generic;
    throw std::invalid_argument("angular: this processor does not run \"" + isa + "\"");
}

}  // namespace

void angular(const AngularJob& job, int threads, const std::string& isa) {
    const Kernel kernel = choose(isa);
    const int64_t size = 2 * int64_t(job.R) * (job.R - 1);  // 4 P
    threads = int(std::max<int64_t>(1, std::min<int64_t>(threads, job.B)));
    std::vector<double> partial(threads * size);
    // A fixed share for each thread and a fixed order of the sums: the same bits every time.
    const auto body = [&](int thread) {
        kernel(job, thread * job.B / threads, (thread + 1) * job.B / threads,
               partial.data() + thread * size);
    };
    std::vector<std::thread> team;
    for (int thread = 1; thread < threads; ++thread) team.emplace_back(body, thread);
    body(0);
    for (auto& member : team) member.join();
    std::fill_n(job.sums, size, 0.0);
    for (int64_t k = 0; k < threads * size; ++k) job.sums[k % size] += partial[k];
}

}  // namespace shallow

void bind_angular(pybind11::module_& m) {
    using namespace shallow;
    using namespace pybind11::literals;
    m.def(
        "angular",
        [](const std::vector<uintptr_t>& rows, const std::vector<int64_t>& strides,
           const std::string& dtype, int64_t B, int64_t D, uintptr_t weights, uintptr_t sums,
           uintptr_t squares, uintptr_t values, int threads, const std::string& isa) {
            const std::vector<std::string> types{"float64", "float32", "float16", "bfloat16"};
            const auto type = std::find(types.begin(), types.end(), dtype) - types.begin();
            if (type == 4) throw std::invalid_argument("angular: no kernel for dtype " + dtype);
            if (rows.size() != strides.size() || rows.size() < 2)
                throw std::invalid_argument("angular: needs a stride for each of 2 or more rows");
            const AngularJob job{reinterpret_cast<const void* const*>(rows.data()),
                                 strides.data(),
                                 Float(type),
                                 int(rows.size()),
                                 B,
                                 D,
                                 reinterpret_cast<const double*>(weights),
                                 reinterpret_cast<double*>(sums),
                                 reinterpret_cast<double*>(squares),
                                 reinterpret_cast<double*>(values)};
            pybind11::gil_scoped_release release;
            angular(job, threads, isa);
        },
        "rows"_a, "strides"_a, "dtype"_a, "B"_a, "D"_a, "weights"_a, "sums"_a, "squares"_a,
        "values"_a, "threads"_a, "isa"_a = "",
        "Addresses of float64 outputs as in csrc/cpu/angular.h; kernels/angular checks shapes.");
}
