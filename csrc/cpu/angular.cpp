#include "cpu/angular.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <new>
#include <stdexcept>
#include <vector>

#include "cpu/bindings.h"
#include "cpu/isa.h"
#include "cpu/borrowed.h"
#include "cpu/released.h"
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
        [](const std::vector<TensorTuple>& rows, const std::vector<int64_t>& strides,
           const std::string& dtype, int64_t B, int64_t D, const Tensor& weights,
           const TensorTuple& sums, const TensorTuple& squares, const Tensor& values, int threads,
           const std::string& isa) {
            const std::vector<std::string> types{"float64", "float32", "float16", "bfloat16"};
            const auto type = std::find(types.begin(), types.end(), dtype) - types.begin();
            if (type == 4) throw std::invalid_argument("angular: no kernel for dtype " + dtype);
            if (rows.size() != strides.size() || rows.size() < 2)
                throw std::invalid_argument("angular: needs a stride for each of 2 or more rows");
            const auto R = int64_t(rows.size()), P = R * (R - 1) / 2;
            std::vector<const void*> starts;
            for (size_t i = 0; i < rows.size(); ++i)
                starts.push_back(Borrowed(rows[i], "rows").rows(dtype, B, D, strides[i]));
            const auto doubles = [](const Tensor& tensor, const char* what, int64_t count) {
                const Borrowed span(tensor, what);
                return static_cast<double*>(tensor ? span.need("float64", count) : nullptr);
            };
            const AngularJob job{starts.data(),
                                 strides.data(),
                                 Float(type),
                                 int(R),
                                 B,
                                 D,
                                 doubles(weights, "weights", B),
                                 doubles(sums, "sums", 4 * P),
                                 doubles(squares, "squares", R * B),
                                 doubles(values, "values", B * P)};
            const Released released;
            angular(job, threads, isa);
        },
        "rows"_a, "strides"_a, "dtype"_a, "B"_a, "D"_a, "weights"_a, "sums"_a, "squares"_a,
        "values"_a, "threads"_a, "isa"_a = "", "Outputs are float64, as in csrc/cpu/angular.h.");
}
