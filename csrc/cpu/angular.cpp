#include "cpu/angular.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <new>
#include <stdexcept>
#include <vector>

#include "cpu/bindings.h"
#include "cpu/isa.h"
#include "cpu/threads.h"

namespace shallow {
namespace {

using Kernel = void (*)(const AngularJob&, int64_t, int64_t, double*);

constexpr int64_t kChunks = 64;  // of samples, which idle threads claim

Kernel choose(const std::string& name) {
    const Isa isa = name.empty() ? best_isa() : isa_from_name(name);
    if (!isa_supported(isa)) throw std::invalid_argument("this processor does not run " + name);
#if defined(SHALLOW_X86)
    if (isa == Isa::amx) return angular_amx;
    if (isa == Isa::avx512) return angular_avx512;
    if (isa >= Isa::avx2) return angular_avx2;
#endif
    return angular_generic;
}

}  // namespace

Scratch::Scratch(size_t bytes) : data(::operator new(bytes, std::align_val_t{64})) {}
Scratch::~Scratch() { ::operator delete(data, std::align_val_t{64}); }

void angular(const AngularJob& job, int threads, const std::string& isa) {
    const Kernel kernel = choose(isa);
    const int64_t size = 2 * int64_t(job.R) * (job.R - 1);  // 4 P
    const int64_t chunk = std::max<int64_t>(1, (job.B + kChunks - 1) / kChunks);
    const int64_t chunks = (job.B + chunk - 1) / chunk;
    std::vector<double> partial(chunks * size);
    parallel_for(threads, job.B, chunk, [&](int64_t begin, int64_t end) {
        kernel(job, begin, end, partial.data() + begin / chunk * size);
    });
    // Chunks that depend on B alone and a fixed order of the sums: the same bits every time.
    std::fill_n(job.sums, size, 0.0);
    for (int64_t first = 0; first < chunks * size; first += size)
        for (int64_t k = 0; k < size; ++k) job.sums[k] += partial[first + k];
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
