// defines: engine._cpu.Packed, w4_unpack, w4_pack
#include "w4.h"

#include <stdexcept>
#include <string>

#include "cpu/bindings.h"

namespace py = pybind11;

namespace {

w4::Scheme parse_scheme(const std::string& name) {
    if (name == "symmetric") return w4::Scheme::symmetric;
    if (name == "zero") return w4::Scheme::zero;
    if (name == "minimum") return w4::Scheme::minimum;
    if (name == "codebook") return w4::Scheme::codebook;
    if (name == "kquant") return w4::Scheme::kquant;
    throw std::invalid_argument("unknown scheme '" + name + "'");
}

w4::ScaleType parse_scale_type(const std::string& name) {
    if (name == "float16") return w4::ScaleType::float16;
    if (name == "bfloat16") return w4::ScaleType::bfloat16;
    if (name == "float32") return w4::ScaleType::float32;
    throw std::invalid_argument("unknown scale dtype '" + name + "'");
}

template <class T>
const T* pointer(std::uintptr_t address) {
    return reinterpret_cast<const T*>(address);
}

w4::Matrix matrix(std::uintptr_t codes, std::uintptr_t scales, std::uintptr_t zeros,
                  std::uintptr_t mins, std::uintptr_t supers, std::uintptr_t codebook,
                  std::uintptr_t perm, std::int64_t n, std::int64_t k, std::int32_t bits,
                  std::int32_t group, const std::string& scheme, const std::string& scale_dtype) {
    w4::Matrix matrix;
    matrix.codes = pointer<std::uint8_t>(codes);
    matrix.scales = pointer<void>(scales);
    matrix.zeros = pointer<std::uint8_t>(zeros);
    matrix.mins = pointer<void>(mins);
    matrix.supers = pointer<std::uint16_t>(supers);
    matrix.codebook = pointer<float>(codebook);
    matrix.perm = pointer<std::int32_t>(perm);
    matrix.n = n;
    matrix.k = k;
    matrix.bits = bits;
    matrix.group = group;
    matrix.scheme = parse_scheme(scheme);
    matrix.scale_type = parse_scale_type(scale_dtype);
    return matrix;
}

void unpack(const w4::Matrix& packed, std::uintptr_t out) {
    auto* rows = reinterpret_cast<float*>(out);
    for (std::int64_t row = 0; row < packed.n; ++row) packed.unpack_row(row, rows + row * packed.k);
}

void pack(std::uintptr_t codes, std::int64_t n, std::int64_t k, int bits, std::uintptr_t out) {
    const auto* from = pointer<std::uint8_t>(codes);
    auto* to = reinterpret_cast<std::uint8_t*>(out);
    const std::int64_t width = w4::row_bytes(k, bits);
    for (std::int64_t row = 0; row < n; ++row) {
        w4::pack_row(from + row * k, k, bits, to + row * width);
    }
}

}  // namespace

void bind_w4_format(py::module_& m) {
    using release = py::call_guard<py::gil_scoped_release>;
    py::class_<w4::Matrix>(m, "Packed", "A packed matrix by address; the caller keeps it alive.")
        .def(py::init(&matrix), py::kw_only(), py::arg("codes"), py::arg("scales"),
             py::arg("zeros") = 0, py::arg("mins") = 0, py::arg("supers") = 0,
             py::arg("codebook") = 0, py::arg("perm") = 0, py::arg("n"), py::arg("k"),
             py::arg("bits"), py::arg("group"), py::arg("scheme"), py::arg("scale_dtype"))
        .def_readonly("n", &w4::Matrix::n)
        .def_readonly("k", &w4::Matrix::k);
    m.def("w4_unpack", &unpack, release(), py::arg("packed"), py::arg("out"),
          "Writes the (n, k) float32 matrix, columns in their original order, at address out.");
    m.def("w4_pack", &pack, release(), py::arg("codes"), py::arg("n"), py::arg("k"),
          py::arg("bits"), py::arg("out"),
          "Packs (n, k) uint8 codes at address codes into n rows at address out.");
}
