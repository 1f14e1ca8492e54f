#include "arrays.hpp"
#include "sparsam/matrix.hpp"

#include <memory>
#include <optional>

namespace sparsam {
namespace {

using Floats = py::array_t<float, py::array::c_style>;
using Bytes = py::array_t<std::uint8_t, py::array::c_style>;

constexpr std::size_t kMaxElements = std::size_t{1} << 40;  // keeps every product of sizes in range

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
  if (rows > kMaxElements || cols > kMaxElements || (cols > 0 && rows > kMaxElements / cols))
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

// The same on memory that the caller vouches for: addresses of contiguous float32 or bfloat16 x and y (0: no
// bias).
void linear_at(const PackedMatrix& w, const std::string& kernel, std::uintptr_t x, bool bfloat16,
               std::size_t tokens, std::uintptr_t bias, const std::string& activation, std::uintptr_t out) {
  const ProductKernel which = kernel_of(kernel);
  const auto* add = reinterpret_cast<const float*>(bias);
  py::gil_scoped_release release;
  if (bfloat16)
    w.linear(which, reinterpret_cast<const std::uint16_t*>(x), tokens, add, activation,
             reinterpret_cast<std::uint16_t*>(out));
  else
    w.linear(which, reinterpret_cast<const float*>(x), tokens, add, activation,
             reinterpret_cast<float*>(out));
}

using Pair = std::pair<std::size_t, std::size_t>;

Conv2d conv2d_of(const PackedMatrix& w, Pair image, Pair kernel, Pair stride, Pair padding, Pair dilation) {
  constexpr std::size_t kMaxLength = std::size_t{1} << 29;  // of any of them: keeps the sums below in range
  for (const Pair& p : {image, kernel, stride, padding, dilation})
    if (p.first > kMaxLength || p.second > kMaxLength)
      throw py::value_error("size too large: expected at most 2^29");
  for (const Pair& p : {image, kernel, stride, dilation})
    if (p.first == 0 || p.second == 0) throw py::value_error("expected sizes of at least 1");
  if (w.cols() % (kernel.first * kernel.second) != 0)
    throw py::value_error("kernel size: expected a divisor of " + std::to_string(w.cols()) + " columns");
  const Conv2d c{w.cols() / (kernel.first * kernel.second),
                 image.first,
                 image.second,
                 kernel.first,
                 kernel.second,
                 stride.first,
                 stride.second,
                 padding.first,
                 padding.second,
                 dilation.first,
                 dilation.second};
  if (c.dilation_h * (c.kernel_h - 1) + 1 > c.height + 2 * c.pad_h ||
      c.dilation_w * (c.kernel_w - 1) + 1 > c.width + 2 * c.pad_w)
    throw py::value_error("image with its padding: expected at least the size of the dilated kernel");
  const std::size_t floats = (c.height + 2 * c.pad_h + c.stride_h) * (c.width + 2 * c.pad_w + c.stride_w);
  if (floats > (std::size_t{1} << 32) / (c.channels + 1))
    throw py::value_error("image too large: expected less than 2^32 floats with its padding");
  return c;
}

// x and out as for linear_at, float32; strides in floats from one image to the next.
void conv2d_at(const PackedMatrix& w, std::uintptr_t x, std::size_t x_stride, std::size_t images, Pair image,
               Pair kernel, Pair stride, Pair padding, Pair dilation, std::uintptr_t bias,
               const std::string& activation, std::uintptr_t out, std::size_t out_stride) {
  const Conv2d c = conv2d_of(w, image, kernel, stride, padding, dilation);
  py::gil_scoped_release release;
  w.conv2d(c, reinterpret_cast<const float*>(x), x_stride, images, reinterpret_cast<const float*>(bias),
           activation, reinterpret_cast<float*>(out), out_stride);
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
           py::arg("activation"), py::arg("out").noconvert())
      .def("linear_at", &linear_at, py::arg("kernel"), py::arg("x"), py::arg("bfloat16"), py::arg("batch"),
           py::arg("bias"), py::arg("activation"), py::arg("out"))
      .def("conv2d_at", &conv2d_at, py::arg("x"), py::arg("x_stride"), py::arg("images"), py::arg("image"),
           py::arg("kernel"), py::arg("stride"), py::arg("padding"), py::arg("dilation"), py::arg("bias"),
           py::arg("activation"), py::arg("out"), py::arg("out_stride"));
}

}  // namespace sparsam
