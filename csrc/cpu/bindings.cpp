#include "cpu/bindings.h"

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
