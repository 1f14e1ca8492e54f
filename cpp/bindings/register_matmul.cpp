#include "arrays.hpp"
#include "packed.hpp"
#include "sparsam/matmul.hpp"

#include <optional>

namespace sparsam {
namespace {

using Triple = std::array<std::size_t, 3>;
using Floats = py::array_t<float, py::array::c_style>;

void multiply(const PackedMatrix& w, const std::string& kernel, const Floats& x,
              const std::optional<Floats>& bias, const std::string& activation, Floats out) {
  const FormPtr form = form_for(w, kernel);
  const auto rows = static_cast<py::ssize_t>(form->rows()), cols = static_cast<py::ssize_t>(form->cols());
  if (x.ndim() != 2 || x.shape(1) != cols)
    throw py::value_error(
        expected("x", shape_text(x), "shape (batch, " + std::to_string(cols) + ")", "reshape it"));
  if (out.ndim() != 2 || out.shape(0) != x.shape(0) || out.shape(1) != rows)
    throw py::value_error(
        expected("out", shape_text(out), "shape (batch, " + std::to_string(rows) + ")", "reshape it"));
  if (bias && bias->size() != rows)
    throw py::value_error(
        expected("bias", bias->size(), std::to_string(rows) + " elements", "pass one for each row"));
  float* to = out.mutable_data();
  const float* from = x.data();
  const float* add = bias ? bias->data() : nullptr;
  const auto batch = static_cast<std::size_t>(x.shape(0));
  const py::gil_scoped_release release;
  linear(*form, from, batch, add, activation, to);
}

// x W^T in a new array, with nothing on the way that a small product would feel; None unless x is a float32
// matrix in C order with as many columns.
py::object product(const PackedMatrix& w, const std::string& kernel, const py::object& x) {
  if (!py::isinstance<Floats>(x)) return py::none();
  const auto from = py::reinterpret_borrow<Floats>(x);
  const FormPtr form = form_for(w, kernel);
  if (from.ndim() != 2 || from.shape(1) != static_cast<py::ssize_t>(form->cols())) return py::none();
  Floats out({from.shape(0), static_cast<py::ssize_t>(form->rows())});
  {
    const float* const data = from.data();
    float* const to = out.mutable_data();
    const auto batch = static_cast<std::size_t>(from.shape(0));
    const py::gil_scoped_release release;
    linear(*form, data, batch, nullptr, "", to);
  }
  return std::move(out);
}

// The same on memory that the caller vouches for: addresses of contiguous float32 or bfloat16 x and y (0: no
// bias).
void multiply_at(const PackedMatrix& w, const std::string& kernel, std::uintptr_t x, bool bfloat16,
                 std::size_t batch, std::uintptr_t bias, const std::string& activation, std::uintptr_t out) {
  const FormPtr form = form_for(w, kernel);
  const auto* add = reinterpret_cast<const float*>(bias);
  const py::gil_scoped_release release;
  if (bfloat16)
    linear(*form, reinterpret_cast<const std::uint16_t*>(x), batch, add, activation,
           reinterpret_cast<std::uint16_t*>(out));
  else
    linear(*form, reinterpret_cast<const float*>(x), batch, add, activation, reinterpret_cast<float*>(out));
}

// Rows of a weight in the form rows, float32; addresses as for linear_at, indices int64.
void look_up_at(const PackedMatrix& w, std::uintptr_t indices, std::size_t n, std::uintptr_t out) {
  const FormPtr form = w.find(FormKind::rows);
  if (form == nullptr)
    throw py::value_error(expected("form 'rows'", "only " + form_names(w).front(),
                                   "a form that the weight has", "build it with add('rows')"));
  const Released released;
  look_up(*form, reinterpret_cast<const std::int64_t*>(indices), n, reinterpret_cast<float*>(out));
}

Conv2d conv2d_of(std::size_t cols, Pair image, Pair kernel, Pair stride, Pair padding, Pair dilation) {
  constexpr std::size_t kMaxLength = std::size_t{1} << 29;  // of any of them: keeps the sums below in range
  for (const Pair& p : {image, kernel, stride, padding, dilation})
    if (p.first > kMaxLength || p.second > kMaxLength)
      throw py::value_error(
          expected("size", std::max(p.first, p.second), "at most 2^29", "pass a smaller one"));
  for (const Pair& p : {image, kernel, stride, dilation})
    if (p.first == 0 || p.second == 0) throw py::value_error(expected("size", 0, "at least 1", "enlarge it"));
  if (cols % (kernel.first * kernel.second) != 0)
    throw py::value_error(expected("kernel size", kernel.first * kernel.second,
                                   "a divisor of " + std::to_string(cols) + " columns",
                                   "pass that of the weight"));
  const Conv2d c{cols / (kernel.first * kernel.second),
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
    throw py::value_error(
        expected("image with its padding",
                 std::to_string(c.height + 2 * c.pad_h) + " x " + std::to_string(c.width + 2 * c.pad_w),
                 "at least the size of the dilated kernel", "pad it"));
  const std::size_t floats = (c.height + 2 * c.pad_h + c.stride_h) * (c.width + 2 * c.pad_w + c.stride_w);
  if (floats > (std::size_t{1} << 32) / (c.channels + 1))
    throw py::value_error(
        expected("image", floats, "less than 2^32 floats with its padding", "cut it into smaller ones"));
  return c;
}

// Addresses as for linear_at, float32; floats from one image to the next, and from one pixel to the next:
// 1 where channels are planes, else they are neighbours, which int8 values allow.
void conv2d_at(const PackedMatrix& w, std::uintptr_t x, std::size_t x_stride, std::size_t images, Pair image,
               Pair kernel, Pair stride, Pair padding, Pair dilation, std::uintptr_t bias,
               const std::string& activation, std::uintptr_t out, std::size_t out_stride, std::size_t x_pixel,
               std::size_t out_pixel) {
  const Conv2d c = conv2d_of(w.any().cols(), image, kernel, stride, padding, dilation);
  const bool int8 = w.any().dtype() == DType::i8;
  if (int8 && w.any().taps().bits() != Taps{kernel.first, kernel.second}.bits())
    throw py::value_error(expected("kernel size",
                                   std::to_string(kernel.first) + " x " + std::to_string(kernel.second),
                                   "the one that the weight was packed with", "pack it again"));
  if (!int8 && (x_pixel != 1 || out_pixel != 1))
    throw py::value_error(expected("pixels", std::max(x_pixel, out_pixel), "planes for float values",
                                   "pass contiguous images"));
  const FormPtr form = form_for(w, int8 ? "slots" : "panels");
  const py::gil_scoped_release release;
  const auto *from = reinterpret_cast<const float*>(x), *add = reinterpret_cast<const float*>(bias);
  auto* const to = reinterpret_cast<float*>(out);
  if (int8)
    int8_conv2d(*form, c, from, {x_stride, x_pixel}, images, add, activation, to, {out_stride, out_pixel});
  else
    conv2d(*form, c, from, x_stride, images, add, activation, to, out_stride);
}

// The same for volumes and float values, which are contiguous: depth, height and width.
void conv3d_at(const PackedMatrix& w, std::uintptr_t x, std::size_t x_stride, std::size_t volumes,
               const Triple& volume, const Triple& kernel, const Triple& stride, const Triple& padding,
               const Triple& dilation, std::uintptr_t bias, const std::string& activation, std::uintptr_t out,
               std::size_t out_stride) {
  const auto within = [](const Triple& t) { return Pair{t[1], t[2]}; };
  const auto across = [](const Triple& t) { return Pair{t[0], 1}; };
  const std::size_t cols = w.any().cols(), taps = kernel[1] * kernel[2];
  // Each is checked as the images that it is seen from two sides.
  const Conv2d side =
      conv2d_of(cols, across(volume), across(kernel), across(stride), {padding[0], 0}, across(dilation));
  const Conv2d front =
      conv2d_of(cols, within(volume), within(kernel), within(stride), within(padding), within(dilation));
  if (front.channels % kernel[0] != 0)
    throw py::value_error(expected("kernel size", kernel[0] * taps,
                                   "a divisor of " + std::to_string(cols) + " columns",
                                   "pass that of the weight"));
  Conv3d c{front};
  c.channels /= kernel[0];
  c.depth = side.height, c.kernel_d = side.kernel_h, c.stride_d = side.stride_h, c.pad_d = side.pad_h;
  c.dilation_d = side.dilation_h;
  const std::size_t floats = (c.height + 2 * c.pad_h + c.stride_h) * (c.width + 2 * c.pad_w + c.stride_w);
  if (floats > (std::size_t{1} << 32) / (c.channels + 1) / (c.depth + 2 * c.pad_d + 1))
    throw py::value_error(
        expected("volume", floats, "less than 2^32 floats with its padding", "cut it into smaller ones"));
  const FormPtr form = form_for(w, "panels");
  const py::gil_scoped_release release;
  conv3d(*form, c, reinterpret_cast<const float*>(x), x_stride, volumes, reinterpret_cast<const float*>(bias),
         activation, reinterpret_cast<float*>(out), out_stride);
}

}  // namespace

void add_products(py::class_<PackedMatrix>& packed) {
  packed
      .def("linear", &multiply, py::arg("kernel"), py::arg("x").noconvert(), py::arg("bias").noconvert(),
           py::arg("activation"), py::arg("out").noconvert())
      .def("product", &product, py::arg("kernel"), py::arg("x"))
      .def("linear_at", &multiply_at, py::arg("kernel"), py::arg("x"), py::arg("bfloat16"), py::arg("batch"),
           py::arg("bias"), py::arg("activation"), py::arg("out"))
      .def("look_up_at", &look_up_at, py::arg("indices"), py::arg("n"), py::arg("out"))
      .def("conv2d_at", &conv2d_at, py::arg("x"), py::arg("x_stride"), py::arg("images"), py::arg("image"),
           py::arg("kernel"), py::arg("stride"), py::arg("padding"), py::arg("dilation"), py::arg("bias"),
           py::arg("activation"), py::arg("out"), py::arg("out_stride"), py::arg("x_pixel") = 1,
           py::arg("out_pixel") = 1)
      .def("conv3d_at", &conv3d_at, py::arg("x"), py::arg("x_stride"), py::arg("volumes"), py::arg("volume"),
           py::arg("kernel"), py::arg("stride"), py::arg("padding"), py::arg("dilation"), py::arg("bias"),
           py::arg("activation"), py::arg("out"), py::arg("out_stride"));
}

}  // namespace sparsam
