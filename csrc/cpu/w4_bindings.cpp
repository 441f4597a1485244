#include <stdexcept>
#include <string>

#include "cpu/bindings.h"
#include "cpu/threads.h"
#include "cpu/w4_matmul.h"

namespace py = pybind11;

namespace shallow {
namespace {

ScaleType float_type(const std::string& name) {
    if (name == "float16") return ScaleType::float16;
    if (name == "bfloat16") return ScaleType::bfloat16;
    if (name == "float32") return ScaleType::float32;
    throw std::invalid_argument("no kernel for dtype " + name);
}

Mode mode_from_name(const std::string& name) {
    if (name == "int8") return Mode::int8;
    if (name == "exact") return Mode::exact;
    throw std::invalid_argument("mode must be 'int8' or 'exact', found '" + name + "'");
}

void run(std::uintptr_t x, std::int64_t m, std::int64_t x_stride, const std::string& x_type,
         const TiledMatrix& w, std::uintptr_t y, std::int64_t y_stride, const std::string& y_type,
         std::uintptr_t bias, const std::string& mode, const std::string& isa, int threads) {
    Rows rows;
    rows.data = reinterpret_cast<const void*>(x);
    rows.m = m;
    rows.k = w.view().k;
    rows.stride = x_stride;
    rows.type = float_type(x_type);
    Output output;
    output.data = reinterpret_cast<void*>(y);
    output.stride = y_stride;
    output.type = float_type(y_type);
    output.bias = reinterpret_cast<const float*>(bias);
    matmul(rows, w, output, mode_from_name(mode), isa_from_name(isa), threads);
}

void rows(const TiledMatrix& w, std::int64_t start, std::int64_t stop, std::uintptr_t out,
          int threads) {
    auto* const to = reinterpret_cast<float*>(out);
    parallel_for(threads, stop - start, 16, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t row = begin; row < end; ++row)
            read_row(w, start + row, to + row * w.view().k);
    });
}

}  // namespace
}  // namespace shallow

void bind_w4_matmul(py::module_& m) {
    using namespace shallow;
    using release = py::call_guard<py::gil_scoped_release>;
    py::class_<TiledMatrix>(m, "W4Tiles", py::buffer_protocol(),
                            "A matrix in the CPU kernels' layout; a buffer of its bytes.")
        .def(py::init<const w4::Matrix&, std::int64_t, int>(), release(), py::arg("packed"),
             py::arg("n"), py::arg("threads"), "Of n rows, the first of them packed.")
        .def("fill", &TiledMatrix::fill, release(), py::arg("packed"), py::arg("first"),
             py::arg("threads"), "Copies rows from `first` on, a multiple of 16.")
        .def(py::init([](std::uintptr_t weights, const std::string& dtype, std::int64_t n,
                         std::int64_t k, int threads) {
                 const auto* const from = reinterpret_cast<const void*>(weights);
                 return TiledMatrix(from, float_type(dtype), n, k, threads);
             }),
             release(), py::arg("weights"), py::arg("dtype"), py::arg("n"), py::arg("k"),
             py::arg("threads"))
        .def(py::init([](std::uintptr_t bytes, std::size_t size) {
                 return TiledMatrix(reinterpret_cast<std::uint8_t*>(bytes), size);
             }),
             py::arg("bytes"), py::arg("size"), "Borrows the bytes of another.")
        .def_buffer([](const TiledMatrix& w) {
            return py::buffer_info(w.bytes(), static_cast<py::ssize_t>(w.size()));
        })
        .def("restore", &TiledMatrix::restore, release(), py::arg("packed"), py::arg("threads"),
             "Writes the arrays that it was made from.")
        .def("rows", &rows, release(), py::arg("start"), py::arg("stop"), py::arg("out"),
             py::arg("threads"), "Writes rows start..stop-1, float32, at address out.")
        .def_property_readonly("shape", [](const TiledMatrix& w) {
            return std::pair(w.view().n, w.view().k);
        })
        .def_property_readonly("permuted", [](const TiledMatrix& w) { return w.perm() != nullptr; })
        .def_property_readonly("nbytes", &TiledMatrix::nbytes);
    m.def("w4_matmul", &run, release(), py::arg("x"), py::arg("m"), py::arg("x_stride"),
          py::arg("x_dtype"), py::arg("w"), py::arg("y"), py::arg("y_stride"), py::arg("y_dtype"),
          py::arg("bias"), py::arg("mode"), py::arg("isa"), py::arg("threads"),
          "Writes x @ w.T + bias, (m, n), at address y; bias is 0 or the address of n float32.");
    m.def(
        "isas",
        [] {
            py::list names;
            for (int i = kIsas - 1; i >= 0; --i)
                if (isa_supported(static_cast<Isa>(i))) names.append(isa_name(static_cast<Isa>(i)));
            return names;
        },
        "Instruction sets that the kernels can use here, best first.");
    m.def("huge_pages_available", &huge_pages_available);
    m.def("pool_threads", [] { return Pool::instance().size(); });
    m.def("resize_pool", [](int threads) { Pool::instance().resize(threads); }, release(),
          py::arg("threads"), "Waits for running kernels.");
}
