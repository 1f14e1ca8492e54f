#include "arrays.hpp"
#include "sparsam/matrix.hpp"

#include <memory>
#include <optional>

namespace sparsam {
namespace {

using Floats = py::array_t<float, py::array::c_style>;
using Bytes = py::array_t<std::uint8_t, py::array::c_style>;

constexpr std::size_t kMost = std::size_t{1} << 40;  // keeps every product of sizes in range

py::dtype numpy_dtype(DType t) {
  switch (t) {
    case DType::f16:
      return py::dtype("float16");
    case DType::f32:
      return py::dtype("float32");
    case DType::f64:
      return py::dtype("float64");
    default:
      return py::dtype::from_args(py::module_::import("ml_dtypes").attr("bfloat16"));
  }
}

const char* name_of(DType t) {
  return t == DType::f16    ? "float16"
         : t == DType::bf16 ? "bfloat16"
         : t == DType::f32  ? "float32"
                            : "float64";
}

ProductKernel kernel_of(const std::string& name) {
  if (name == "bitmask") return ProductKernel::bitmask;
  if (name == "panels") return ProductKernel::panels;
  throw py::value_error("kernel '" + name + "': expected bitmask or panels");
}

DType value_dtype(const py::array& a) {
  const DType t = dtype_of(a);
  if (t == DType::f64) throw py::type_error("dtype float64: expected float32, bfloat16 or float16 values");
  return t;
}

void check_size(std::size_t rows, std::size_t cols) {
  if (rows > kMost || cols > kMost || (cols > 0 && rows > kMost / cols))
    throw py::value_error("shape too large: expected at most 2^40 elements");
}

std::unique_ptr<PackedMatrix> pack(const py::array& w) {
  if (w.ndim() != 2)
    throw py::value_error("expected a matrix, got " + std::to_string(w.ndim()) + " dimensions");
  value_dtype(w);
  const View view = view_of(w);
  const auto rows = static_cast<std::size_t>(w.shape(0)), cols = static_cast<std::size_t>(w.shape(1));
  check_size(rows, cols);
  py::gil_scoped_release release;
  return std::make_unique<PackedMatrix>(view, rows, cols);
}

std::unique_ptr<PackedMatrix> from_parts(std::size_t rows, std::size_t cols, const Bytes& bits,
                                         const py::array& values) {
  value_dtype(values);
  const View view = view_of(values);
  check_size(rows, cols);
  if (static_cast<std::size_t>(bits.size()) != rows * ((cols + 7) / 8))
    throw py::value_error(std::to_string(bits.size()) + " mask bytes: expected " +
                          std::to_string(rows * ((cols + 7) / 8)));
  py::gil_scoped_release release;
  return std::make_unique<PackedMatrix>(rows, cols, bits.data(), view);
}

Bytes bits(const PackedMatrix& w) {
  Bytes out({static_cast<py::ssize_t>(w.rows()), static_cast<py::ssize_t>((w.cols() + 7) / 8)});
  w.bits(out.mutable_data());
  return out;
}

py::array values(const PackedMatrix& w) {
  return py::array(numpy_dtype(w.dtype()), {static_cast<py::ssize_t>(w.nnz())}, {}, w.values());
}

py::array unpack(const PackedMatrix& w) {
  py::array out(numpy_dtype(w.dtype()),
                {static_cast<py::ssize_t>(w.rows()), static_cast<py::ssize_t>(w.cols())});
  void* to = out.mutable_data();
  py::gil_scoped_release release;
  w.unpack(to);
  return out;
}

void linear(const PackedMatrix& w, const std::string& kernel, const Floats& x,
            const std::optional<Floats>& bias, const std::string& activation, Floats out) {
  const auto rows = static_cast<py::ssize_t>(w.rows()), cols = static_cast<py::ssize_t>(w.cols());
  if (x.ndim() != 2 || x.shape(1) != cols)
    throw py::value_error("x: expected shape (tokens, " + std::to_string(cols) + ")");
  if (out.ndim() != 2 || out.shape(0) != x.shape(0) || out.shape(1) != rows)
    throw py::value_error("out: expected shape (tokens, " + std::to_string(rows) + ")");
  if (bias && bias->size() != rows)
    throw py::value_error("bias: expected " + std::to_string(rows) + " elements");
  const ProductKernel which = kernel_of(kernel);
  float* to = out.mutable_data();
  const float* from = x.data();
  const float* add = bias ? bias->data() : nullptr;
  const auto tokens = static_cast<std::size_t>(x.shape(0));
  py::gil_scoped_release release;
  w.linear(which, from, tokens, add, activation, to);
}

void prepare(const PackedMatrix& w, const std::string& kernel, std::size_t tokens) {
  const ProductKernel which = kernel_of(kernel);
  py::gil_scoped_release release;
  w.prepare(which, tokens);
}

}  // namespace

void register_matrix(py::module_& m) {
  py::class_<PackedMatrix>(m, "Packed")
      .def_static("pack", &pack, py::arg("w"))
      .def_static("from_parts", &from_parts, py::arg("rows"), py::arg("cols"), py::arg("bits"),
                  py::arg("values"))
      .def_property_readonly("rows", &PackedMatrix::rows)
      .def_property_readonly("cols", &PackedMatrix::cols)
      .def_property_readonly("nnz", &PackedMatrix::nnz)
      .def_property_readonly("dtype", [](const PackedMatrix& w) { return name_of(w.dtype()); })
      .def_property_readonly("nbytes", &PackedMatrix::bytes)
      .def_property_readonly("layout_nbytes", &PackedMatrix::panel_bytes)
      .def_property_readonly("blocked", &PackedMatrix::shared_rows)
      .def("bits", &bits)
      .def("values", &values)
      .def("unpack", &unpack)
      .def("prepare", &prepare, py::arg("kernel"), py::arg("batch"))
      .def("linear", &linear, py::arg("kernel"), py::arg("x").noconvert(), py::arg("bias").noconvert(),
           py::arg("activation"), py::arg("out").noconvert());
}

}  // namespace sparsam
