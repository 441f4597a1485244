#include "cpu/bindings.h"

#include "cpu/features.h"

namespace {

void bind_features(pybind11::module_& m) {
    m.def(
        "cpu_features",
        [] {
            pybind11::dict named;
#define SHALLOW_ENTRY(name) named[#name] = shallow::features().name;
            SHALLOW_FEATURES(SHALLOW_ENTRY)
#undef SHALLOW_ENTRY
            return named;
        },
        "dict of bool: the instruction sets that the processor has and the system supports.");
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() =
        "CPU kernels on tensors as engine.kernels.native.span() describes them; extents are "
        "checked.";
    bind_features(m);
    bind_bandwidth(m);
    bind_w4_format(m);
    bind_angular(m);
    bind_w4_matmul(m);
    bind_peak(m);
    bind_decoder(m);
}
