#include "cuda/bindings.h"

#include <pybind11/pybind11.h>

#include "cuda/attention.h"
#include "cuda/w4_matmul.h"

namespace py = pybind11;
using release_gil = py::call_guard<py::gil_scoped_release>;

namespace {

py::dict device_info(int device) {
    const shallow::DeviceInfo found = shallow::device_info(device);
    return py::dict(py::arg("name") = found.name,
                    py::arg("capability") = py::make_tuple(found.major, found.minor),
                    py::arg("multiprocessors") = found.multiprocessors,
                    py::arg("memory_bytes") = found.memory_bytes,
                    py::arg("l2_bytes") = found.l2_bytes);
}

double copy_bandwidth(int64_t bytes, int passes, uintptr_t stream) {
    return shallow::copy_bandwidth(bytes, passes, reinterpret_cast<void*>(stream));
}

void w4_matmul(uintptr_t call, uintptr_t stream) {
    shallow::w4_matmul(*reinterpret_cast<const shallow::W4Matmul*>(call),
                       reinterpret_cast<void*>(stream));
}

void decode_attention(uintptr_t call, uintptr_t stream) {
    shallow::decode_attention(*reinterpret_cast<const shallow::DecodeAttention*>(call),
                              reinterpret_cast<void*>(stream));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() =
        "CUDA kernels on raw pointers and a stream (torch's `stream.cuda_stream`; 0: default).";
    m.def("device_count", shallow::device_count, "GPUs that the driver shows; 0 without a driver.");
    m.def("device_error", shallow::device_error, "Why there is no GPU to use; empty for one.");
    m.def("explain", shallow::explain, py::arg("status"), py::arg("driver"), py::arg("runtime"),
          "What a CUDA status means where devices were counted, beside these versions.");
    m.def("device_info", device_info, py::arg("device") = 0,
          "dict: name, capability (major, minor), multiprocessors, memory_bytes, l2_bytes.");
    m.def("copy_bandwidth", copy_bandwidth, py::arg("bytes"), py::arg("passes") = 8,
          py::arg("stream") = 0, release_gil(),
          "GB/s (1e9), bytes read plus bytes written, of copying `bytes` bytes in the memory of\n"
          "the current device: the best of `passes` passes.");
    m.def("w4_matmul", w4_matmul, py::arg("call"), py::arg("stream") = 0,
          "Launches the decode matmul on the current device; `call` is the address of a W4Matmul\n"
          "(csrc/cuda/w4_matmul.h, kernels/w4/cuda.py).");
    m.def("prepare_w4_matmul", shallow::prepare_w4_matmul, release_gil(),
          "Loads every variant of the decode matmul on the current device, before a capture.");
    m.def("decode_attention", decode_attention, py::arg("call"), py::arg("stream") = 0,
          "Launches decode attention on the current device; `call` is the address of a\n"
          "DecodeAttention (csrc/cuda/attention.h, kernels/layer/cuda.py).");
    m.def("prepare_decode_attention", shallow::prepare_decode_attention, release_gil(),
          "Loads every variant of decode attention on the current device, before a capture.");
    m.attr("DECODE_ATTENTION_BYTES") = sizeof(shallow::DecodeAttention);
    m.attr("W4_MATMUL_BYTES") = sizeof(shallow::W4Matmul);
}
