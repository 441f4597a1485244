#include <stdexcept>
#include <string>

#include "cpu/bindings.h"
#include "cpu/borrowed.h"
#include "cpu/released.h"
#include "cpu/threads.h"
#include "cpu/w4_gguf.h"
#include "cpu/w4_matmul.h"

namespace py = pybind11;

namespace shallow {
namespace {

void run(const TensorTuple& x, std::int64_t m, std::int64_t x_stride, const TiledMatrix& w,
         const TensorTuple& y, std::int64_t y_stride, const Tensor& bias, const std::string& mode,
         const std::string& isa, int threads) {
    const Borrowed from(x, "x"), to(y, "y");
    Rows rows;
    rows.data = from.rows(from.dtype(), m, w.view().k, x_stride);
    rows.m = m;
    rows.k = w.view().k;
    rows.stride = x_stride;
    rows.type = float_from_name(from.dtype());
    Output output;
    output.data = to.rows(to.dtype(), m, w.view().n, y_stride);
    output.stride = y_stride;
    output.type = float_from_name(to.dtype());
    output.bias = static_cast<const float*>(Borrowed(bias, "bias").of("float32", w.view().n));
    matmul(rows, w, output, mode_from_name(mode), isa_from_name(isa), threads);
}

void rows(const TiledMatrix& w, std::int64_t start, std::int64_t stop, const TensorTuple& out,
          int threads) {
    if (start < 0 || start > stop || stop > w.view().n) throw std::invalid_argument("rows");
    auto* const to =
        static_cast<float*>(Borrowed(out, "out").need("float32", (stop - start) * w.view().k));
    parallel_for(threads, stop - start, 16, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t row = begin; row < end; ++row)
            read_row(w, start + row, to + row * w.view().k);
    });
}

// Tiles that a file holds, and beside them what kernels/w4/tiled.py says.
TiledMatrix borrow(std::int64_t n, std::int64_t k, std::int32_t bits, std::int32_t group,
                   const std::string& scheme, const std::string& scale_dtype,
                   const TensorTuple& tiles, const Tensor& supers, const Tensor& codebook,
                   const Tensor& perm) {
    w4::Matrix matrix = describe_matrix(n, k, bits, group, scheme, scale_dtype);
    const auto needed = [&](const Tensor& tensor, const char* what, bool wanted, const char* dtype,
                            std::int64_t count) {
        const Borrowed span(tensor, what);
        return wanted ? span.need(dtype, count) : span.of(dtype, count);
    };
    const std::int64_t count = w4::ceil_div(n, kTileRows), width = w4::ceil_div(k, w4::kSuper);
    const std::int64_t halves = matrix.scheme == w4::Scheme::kquant ? 2 * kTileRows : kTileRows;
    matrix.codebook = static_cast<const float*>(
        needed(codebook, "codebook", matrix.scheme == w4::Scheme::codebook, "float32", 16));
    matrix.supers = static_cast<const std::uint16_t*>(
        needed(supers, "supers", w4::has_supers(matrix.scheme), "float16", count * width * halves));
    matrix.perm = columns_from(perm, k);
    const std::int64_t size = count * TiledMatrix(matrix, nullptr).view().tile_bytes;
    return TiledMatrix(matrix,
                       static_cast<std::uint8_t*>(Borrowed(tiles, "tiles").need("uint8", size)));
}

using release = py::call_guard<Released>;

void bind_tiled_matrix(py::module_& m) {
    py::class_<TiledMatrix>(m, "TiledMatrix", py::buffer_protocol(), py::dynamic_attr(),
                            "A matrix in the CPU kernels' layout; a buffer of its bytes.")
        .def(py::init<const w4::Matrix&, int>(), release(), py::arg("packed"), py::arg("threads"))
        .def(py::init([](const TensorTuple& weights, std::int64_t n, std::int64_t k, int threads) {
                 const Borrowed from(weights, "weights");
                 return TiledMatrix(from.rows(from.dtype(), n, k, k), float_from_name(from.dtype()),
                                    n, k, threads);
             }),
             release(), py::arg("weights"), py::arg("n"), py::arg("k"), py::arg("threads"))
        .def(py::init([](const TensorTuple& bytes) {
                 const std::int64_t size = std::get<1>(bytes);
                 return TiledMatrix(
                     static_cast<std::uint8_t*>(Borrowed(bytes, "bytes").need("uint8", size)),
                     static_cast<std::size_t>(size));
             }),
             py::arg("bytes"), "Borrows the bytes of another.")
        .def(py::init(&borrow), py::kw_only(), py::arg("n"), py::arg("k"), py::arg("bits"),
             py::arg("group"), py::arg("scheme"), py::arg("scale_dtype"), py::arg("tiles"),
             py::arg("supers") = py::none(), py::arg("codebook") = py::none(),
             py::arg("perm") = py::none(), "Borrows tiles that have no bytes before them.")
        .def_buffer([](const TiledMatrix& w) {
            return py::buffer_info(w.bytes(), static_cast<py::ssize_t>(w.bytes() ? w.size() : 0));
        })
        .def("fill", &TiledMatrix::fill, release(), py::arg("packed"), py::arg("threads"),
             "Writes the tiles of these arrays.")
        .def("restore", &TiledMatrix::restore, release(), py::arg("packed"), py::arg("threads"),
             "Writes the arrays that it was made from.")
        .def(
            "holds",
            [](const TiledMatrix& w, std::int32_t bits, std::int32_t group,
               const std::string& scheme, const std::string& scale_dtype) {
                w4::Matrix like =
                    describe_matrix(w.view().n, w.view().k, bits, group, scheme, scale_dtype);
                like.perm = w.perm();
                return w.holds(like);
            },
            py::arg("bits"), py::arg("group"), py::arg("scheme"), py::arg("scale_dtype"),
            "Whether `restore` gives a matrix of that spec.")
        .def("rows", &rows, release(), py::arg("start"), py::arg("stop"), py::arg("out"),
             py::arg("threads"), "Writes rows start..stop-1 to out, float32.")
        .def_property_readonly(
            "shape", [](const TiledMatrix& w) { return std::pair(w.view().n, w.view().k); })
        .def_property_readonly("permuted", [](const TiledMatrix& w) { return w.perm() != nullptr; })
        .def_property_readonly("nbytes", &TiledMatrix::nbytes);
}

}  // namespace
}  // namespace shallow

void bind_w4_matmul(py::module_& m) {
    using namespace shallow;
    bind_tiled_matrix(m);
    m.def(
        "tile_bytes",
        [](std::int64_t k, std::int32_t bits, std::int32_t group, const std::string& scheme,
           const std::string& scale_dtype) {
            float codebook[16] = {};
            w4::Matrix matrix = describe_matrix(1, k, bits, group, scheme, scale_dtype);
            matrix.codebook = codebook;
            return TiledMatrix(matrix, nullptr).view().tile_bytes;
        },
        py::kw_only(), py::arg("k"), py::arg("bits"), py::arg("group"), py::arg("scheme"),
        py::arg("scale_dtype"), "Of 16 rows.");
    m.def(
        "tiles_of_gguf",
        [](const std::string& type, std::int64_t n, std::int64_t k, const TensorTuple& codebook) {
            return tiles_of_gguf(
                type, n, k,
                static_cast<const float*>(Borrowed(codebook, "codebook").need("float32", 16)));
        },
        release(), py::arg("type"), py::arg("n"), py::arg("k"), py::arg("codebook"),
        "The TiledMatrix that blocks of a GGUF type become, zeros yet.");
    m.def(
        "fill_gguf",
        [](const TiledMatrix& tiles, const std::string& type, const TensorTuple& blocks,
           std::int64_t first, int threads) {
            const std::int64_t size = std::get<1>(blocks);
            return fill_gguf(
                tiles, type,
                static_cast<const std::uint8_t*>(Borrowed(blocks, "blocks").need("uint8", size)),
                size, first, threads);
        },
        release(), py::arg("tiles"), py::arg("type"), py::arg("blocks"), py::arg("first"),
        py::arg("threads"),
        "Writes the rows from `first` on from their GGUF blocks; False where a scale is NaN or "
        "Inf.");
    m.def("w4_matmul", &run, release(), py::arg("x"), py::arg("m"), py::arg("x_stride"),
          py::arg("w"), py::arg("y"), py::arg("y_stride"), py::arg("bias"), py::arg("mode"),
          py::arg("isa"), py::arg("threads"),
          "Writes x @ w.T + bias, (m, n), to y; bias is None or n float32.");
    m.def(
        "isas",
        [] {
            py::list names;
            for (int i = kIsas - 1; i >= 0; --i)
                if (isa_supported(static_cast<Isa>(i))) names.append(isa_name(static_cast<Isa>(i)));
            return names;
        },
        "Instruction sets that the kernels can use here, best first.");
    m.def("pool_threads", [] { return Pool::instance().size(); });
    m.def(
        "resize_pool", [](int threads) { Pool::instance().resize(threads); }, release(),
        py::arg("threads"), "Waits for running kernels.");
}
