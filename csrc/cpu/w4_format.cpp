// defines: engine._cpu.Packed, w4_unpack
#include "w4.h"

#include <stdexcept>
#include <string>

#include "cpu/bindings.h"
#include "cpu/borrowed.h"
#include "cpu/released.h"

namespace py = pybind11;

namespace {

w4::Scheme parse_scheme(const std::string& name) {
    if (name == "symmetric") return w4::Scheme::symmetric;
    if (name == "zero") return w4::Scheme::zero;
    if (name == "minimum") return w4::Scheme::minimum;
    if (name == "codebook") return w4::Scheme::codebook;
    if (name == "kquant") return w4::Scheme::kquant;
    if (name == "stepped") return w4::Scheme::stepped;
    throw std::invalid_argument("unknown scheme '" + name + "'");
}

using shallow::Borrowed;
using shallow::Tensor;
using shallow::TensorTuple;

w4::Matrix matrix(const TensorTuple& codes, const TensorTuple& scales, const Tensor& zeros,
                  const Tensor& mins, const Tensor& supers, const Tensor& codebook,
                  const Tensor& perm, std::int64_t n, std::int64_t k, std::int32_t bits,
                  std::int32_t group, const std::string& scheme, const std::string& scale_dtype) {
    w4::Matrix matrix = describe_matrix(n, k, bits, group, scheme, scale_dtype);
    if (bits == 6) throw std::invalid_argument("tiles alone have 6 bits");
    const std::int64_t groups = n * matrix.groups();
    const bool kquant = matrix.scheme == w4::Scheme::kquant;
    const std::string scale = kquant ? "uint8" : scale_dtype;
    const auto needed = [&](const Tensor& tensor, const char* what, bool wanted,
                            const std::string& dtype, std::int64_t count) {
        return wanted ? Borrowed(tensor, what).need(dtype, count) : nullptr;
    };
    matrix.codes = static_cast<const std::uint8_t*>(
        needed(codes, "codes", true, "uint8", n * matrix.row_bytes()));
    matrix.scales = needed(scales, "scales", true, scale, groups);
    matrix.zeros = static_cast<const std::uint8_t*>(
        needed(zeros, "zeros", matrix.scheme == w4::Scheme::zero, "uint8", groups));
    matrix.mins =
        needed(mins, "mins", kquant || matrix.scheme == w4::Scheme::minimum, scale, groups);
    matrix.supers = static_cast<const std::uint16_t*>(
        needed(supers, "supers", kquant, "float16", 2 * n * w4::ceil_div(k, w4::kSuper)));
    matrix.codebook = static_cast<const float*>(
        needed(codebook, "codebook", matrix.scheme == w4::Scheme::codebook, "float32", 16));
    matrix.perm = columns_from(perm, k);
    return matrix;
}

void unpack(const w4::Matrix& packed, const TensorTuple& out) {
    auto* rows = static_cast<float*>(Borrowed(out, "out").need("float32", packed.n * packed.k));
    for (std::int64_t row = 0; row < packed.n; ++row) packed.unpack_row(row, rows + row * packed.k);
}

}  // namespace

w4::ScaleType float_from_name(const std::string& name) {
    if (name == "float16") return w4::ScaleType::float16;
    if (name == "bfloat16") return w4::ScaleType::bfloat16;
    if (name == "float32") return w4::ScaleType::float32;
    throw std::invalid_argument("no kernel for dtype '" + name + "'");
}

const std::int32_t* columns_from(const shallow::Tensor& perm, std::int64_t k) {
    const auto* const columns =
        static_cast<const std::int32_t*>(Borrowed(perm, "perm").of("int32", k));
    if (columns && !w4::are_columns(columns, k))
        throw std::invalid_argument("perm has a column that is none of the matrix's");
    return columns;
}

w4::Matrix describe_matrix(std::int64_t n, std::int64_t k, std::int32_t bits, std::int32_t group,
                           const std::string& scheme, const std::string& scale_dtype) {
    if (n < 1 || k < 1 || group < 0 || (bits != 4 && bits != 6 && bits != 8))
        throw std::invalid_argument("a matrix must have rows, columns and 4, 6 or 8 bits");
    w4::Matrix matrix{};
    matrix.n = n;
    matrix.k = k;
    matrix.bits = bits;
    matrix.group = group;
    matrix.scheme = parse_scheme(scheme);
    matrix.scale_type = float_from_name(scale_dtype);
    if (group != 0 && group != 16 && group != 32 && group != 64 && group != 128)
        throw std::invalid_argument("no matrix has groups of " + std::to_string(group));
    if (w4::has_supers(matrix.scheme) && group != (matrix.scheme == w4::Scheme::kquant ? 32 : 16))
        throw std::invalid_argument("no matrix in groups of " + std::to_string(group) + " is " +
                                    scheme);
    const bool of_gguf = w4::has_supers(matrix.scheme) || matrix.scheme == w4::Scheme::symmetric ||
                         matrix.scheme == w4::Scheme::minimum;
    const bool of_nibbles =
        matrix.scheme == w4::Scheme::codebook || matrix.scheme == w4::Scheme::kquant;
    if (bits == 6 ? !of_gguf : matrix.scheme == w4::Scheme::stepped || (bits == 8 && of_nibbles))
        throw std::invalid_argument("no matrix of " + std::to_string(bits) + " bits is " + scheme);
    return matrix;
}

void bind_w4_format(py::module_& m) {
    using release = py::call_guard<shallow::Released>;
    py::class_<w4::Matrix>(m, "Packed", "A packed matrix that borrows; the caller keeps it alive.")
        .def(py::init(&matrix), py::kw_only(), py::arg("codes"), py::arg("scales"),
             py::arg("zeros") = py::none(), py::arg("mins") = py::none(),
             py::arg("supers") = py::none(), py::arg("codebook") = py::none(),
             py::arg("perm") = py::none(), py::arg("n"), py::arg("k"), py::arg("bits"),
             py::arg("group"), py::arg("scheme"), py::arg("scale_dtype"));
    m.def("w4_unpack", &unpack, release(), py::arg("packed"), py::arg("out"),
          "Writes the (n, k) float32 matrix, columns in their original order, to out.");
}
