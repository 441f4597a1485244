#include "cpu/bindings.h"

PYBIND11_MODULE(_cpu, m) {
    m.doc() =
        "CPU kernels on raw pointers; engine.kernels checks shapes and dtypes before it calls.";
    bind_features(m);
    bind_bandwidth(m);
    bind_w4_format(m);
    bind_angular(m);
    bind_w4_matmul(m);
    bind_peak(m);
    bind_decoder(m);
}
