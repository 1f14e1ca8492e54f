#include "arrays.hpp"
#include "packed.hpp"
#include "sparsam/forms.hpp"
#include "sparsam/matmul.hpp"

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
    case DType::i8:
      return py::dtype("int8");
    case DType::i4:
      return py::dtype("uint8");  // codes, two in a byte
    default:
      return py::dtype::from_args(py::module_::import("ml_dtypes").attr("bfloat16"));
  }
}

const char* name_of(DType t) {
  return t == DType::f16    ? "float16"
         : t == DType::bf16 ? "bfloat16"
         : t == DType::f32  ? "float32"
         : t == DType::i8   ? "int8"
         : t == DType::i4   ? "int4"
                            : "float64";
}

FormKind kind_of(const std::string& what, const std::string& name) {
  for (const FormKind kind : kFormKinds)
    if (name == name_of(kind)) return kind;
  throw py::value_error(expected(what, quoted(name), "bitmask, panels, slots or rows", "pass one of them"));
}

DType value_dtype(const py::array& a) {
  const DType t = dtype_of(a);
  if (t == DType::f64)
    throw py::type_error(
        expected("values", "dtype float64", "float32, bfloat16 or float16", "convert them with .astype()"));
  return t;
}

void check_size(std::size_t rows, std::size_t cols) {
  if (rows > kMaxElements || cols > kMaxElements || (cols > 0 && rows > kMaxElements / cols))
    throw py::value_error(expected("shape", std::to_string(rows) + " x " + std::to_string(cols),
                                   "at most 2^40 elements", "split the matrix"));
}

View matrix_view(const py::array& w) {
  if (w.ndim() != 2) throw py::value_error(expected("weight", shape_text(w), "a matrix", "reshape it"));
  value_dtype(w);
  const View view = view_of(w);
  check_size(static_cast<std::size_t>(w.shape(0)), static_cast<std::size_t>(w.shape(1)));
  return view;
}

PackedMatrix pack(const py::array& w) {
  const View view = matrix_view(w);
  const auto rows = static_cast<std::size_t>(w.shape(0)), cols = static_cast<std::size_t>(w.shape(1));
  const Released released;
  return PackedMatrix(pack_bitmask(view, rows, cols));
}

PackedMatrix from_mask(const py::array& w, const Words& words) {
  const View view = matrix_view(w);
  const auto rows = static_cast<std::size_t>(w.shape(0)), cols = static_cast<std::size_t>(w.shape(1));
  const std::uint64_t* const mask = checked_words(words, view.size());
  const Released released;
  return PackedMatrix(pack_bitmask(view, rows, cols, mask));
}

void check_bits(std::size_t rows, std::size_t cols, const Bytes& bits) {
  check_size(rows, cols);
  if (static_cast<std::size_t>(bits.size()) != rows * ((cols + 7) / 8))
    throw py::value_error(expected("bits", std::to_string(bits.size()) + " bytes",
                                   std::to_string(rows * ((cols + 7) / 8)) + " bytes", "pass whole rows"));
}

PackedMatrix from_parts(std::size_t rows, std::size_t cols, const Bytes& bits, const py::array& values) {
  value_dtype(values);
  const View view = view_of(values);
  check_bits(rows, cols, bits);
  const std::uint8_t* const from = bits.data();
  const py::gil_scoped_release release;
  return PackedMatrix(pack_bitmask(rows, cols, from, view));
}

using Int8s = py::array_t<std::int8_t, py::array::c_style>;

void check_scales(std::size_t rows, const Floats& scales) {
  if (scales.ndim() != 1 || static_cast<std::size_t>(scales.size()) != rows)
    throw py::value_error(
        expected("scales", shape_text(scales), std::to_string(rows) + ", one for each row", "pass as many"));
}

Taps taps_of(const Pair& pair, std::size_t cols) {
  const Taps taps{pair.first, pair.second};
  if (pair != Pair{0, 0} && !taps.fits(cols))
    throw py::value_error(
        expected("taps", std::to_string(pair.first) + " x " + std::to_string(pair.second),
                 "sizes up to 65535 whose product divides " + std::to_string(cols) + " columns",
                 "pass those of the convolution, or use float values"));
  return Taps::of(taps.bits());
}

PackedMatrix pack_quantised(const Int8s& w, const Floats& scales, const Pair& kernel) {
  if (w.ndim() != 2) throw py::value_error(expected("w", shape_text(w), "two dimensions", "reshape it"));
  const auto rows = static_cast<std::size_t>(w.shape(0)), cols = static_cast<std::size_t>(w.shape(1));
  check_scales(rows, scales);
  const Taps taps = taps_of(kernel, cols);
  const std::int8_t* const from = w.data();
  const float* const scale = scales.data();
  const Released released;
  return PackedMatrix(pack_int8(from, rows, cols, scale, taps));
}

PackedMatrix from_int8_parts(std::size_t rows, std::size_t cols, const Bytes& bits, const Int8s& values,
                             const Floats& scales, const Pair& kernel) {
  check_bits(rows, cols, bits);
  check_scales(rows, scales);
  const Taps taps = taps_of(kernel, cols);
  const std::uint8_t* const from = bits.data();
  const std::int8_t* const value = values.data();
  const float* const scale = scales.data();
  const auto n = static_cast<std::size_t>(values.size());
  const py::gil_scoped_release release;
  return PackedMatrix(pack_int8(rows, cols, from, value, n, scale, taps));
}

struct Int4Grid {
  const float* scales;
  const std::int8_t* levels;

  Int4Grid(std::size_t rows, std::size_t cols, std::size_t width, const Floats& scale, const Int8s& level)
      : scales(scale.data()), levels(level.data()) {
    if (width != 64 && width != 128)
      throw py::value_error(expected("width", width, "64 or 128 columns", "pass one of them"));
    const std::size_t units = (cols + width - 1) / width;
    if (scale.ndim() != 2 || static_cast<std::size_t>(scale.shape(0)) != rows ||
        static_cast<std::size_t>(scale.shape(1)) != units)
      throw py::value_error(expected(
          "scales", shape_text(scale),
          std::to_string(rows) + " x " + std::to_string(units) + ", one for each row and group of columns",
          "pass as many"));
    if (level.ndim() != 1 || level.size() != 16)
      throw py::value_error(expected("levels", shape_text(level), "16", "pass as many"));
  }
};

PackedMatrix pack_levels(const Int8s& w, std::size_t width, const Floats& scales, const Int8s& levels) {
  if (w.ndim() != 2) throw py::value_error(expected("w", shape_text(w), "two dimensions", "reshape it"));
  const auto rows = static_cast<std::size_t>(w.shape(0)), cols = static_cast<std::size_t>(w.shape(1));
  const Int4Grid grid(rows, cols, width, scales, levels);
  const std::int8_t* const from = w.data();
  const Released released;
  return PackedMatrix(pack_int4(from, rows, cols, width, grid.scales, grid.levels));
}

PackedMatrix from_int4_parts(std::size_t rows, std::size_t cols, std::size_t width, const Bytes& bits,
                             const Bytes& values, const Floats& scales, const Int8s& levels) {
  check_bits(rows, cols, bits);
  const Int4Grid grid(rows, cols, width, scales, levels);
  const std::uint8_t *const from = bits.data(), *const value = values.data();
  const auto n = static_cast<std::size_t>(values.size());
  const py::gil_scoped_release release;
  return PackedMatrix(pack_int4(rows, cols, width, from, value, n, grid.scales, grid.levels));
}

// Keeps a Python object alive; it may be let go by a thread that does not hold the GIL.
std::shared_ptr<const void> owner_of(const py::object& object) {
  return {new py::object(object), [](const py::object* held) {
            const py::gil_scoped_acquire acquire;
            delete held;
          }};
}

PackedMatrix from_buffers(const std::vector<py::array>& buffers, bool trusted) {
  for (const py::array& a : buffers)
    if (a.ndim() != 1 || a.dtype().kind() != 'u' || a.itemsize() != 1 ||
        (a.flags() & py::array::c_style) == 0)
      throw py::value_error(expected("buffer",
                                     py::repr(a.dtype()).cast<std::string>() + " of " + shape_text(a),
                                     "a contiguous vector of uint8", "make it one"));
  std::vector<std::shared_ptr<const void>> owners;
  for (const py::array& a : buffers) owners.push_back(owner_of(a));
  std::vector<std::pair<const void*, std::size_t>> bytes;
  for (const py::array& a : buffers) bytes.emplace_back(a.data(), static_cast<std::size_t>(a.size()));
  const py::gil_scoped_release release;
  std::vector<FormPtr> found;
  for (std::size_t i = 0; i < bytes.size(); ++i)
    found.push_back(Form::adopt(bytes[i].first, bytes[i].second, owners[i], trusted));
  return PackedMatrix(found, trusted);
}

// Forms come and go under the GIL alone, so that there is no lock that a forked child could find held; they
// are built without it.
void add(PackedMatrix& w, const std::string& name) {
  const FormKind kind = kind_of("form", name);
  if (w.find(kind) != nullptr) return;
  FormPtr built;
  const PackedMatrix copy = w;
  {
    const py::gil_scoped_release release;
    built = copy.get(kind);
  }
  if (w.find(kind) == nullptr) w.insert(std::move(built));
}

void keep(PackedMatrix& w, const std::vector<std::string>& names) {
  PackedMatrix kept = w;
  for (const FormKind kind : kFormKinds)
    if (std::find(names.begin(), names.end(), name_of(kind)) == names.end()) kept.erase(kind);
  for (const std::string& name : names) kind_of("form", name);
  if (form_names(kept).empty())
    throw py::value_error(expected("forms", "others than " + form_names(w).front(),
                                   "at least one that the weight has", "name that one"));
  w = kept;
}

py::array buffer(const PackedMatrix& w, const std::string& name) {
  const FormPtr& form = w.find(kind_of("form", name));
  if (form == nullptr)
    throw py::value_error(expected("form " + quoted(name), "only " + form_names(w).front(),
                                   "a form that the weight has", "build it with add(" + quoted(name) + ")"));
  const py::capsule owner(new FormPtr(form), [](void* held) { delete static_cast<FormPtr*>(held); });
  py::array_t<std::uint8_t> bytes(static_cast<py::ssize_t>(form->bytes()),
                                  reinterpret_cast<const std::uint8_t*>(form->data()), owner);
  bytes.attr("setflags")(py::arg("write") = false);
  return std::move(bytes);
}

std::size_t nbytes(const PackedMatrix& w) {
  std::size_t n = 0;
  for (const FormKind kind : kFormKinds)
    if (const FormPtr& form = w.find(kind); form != nullptr) n += form->bytes();
  return n;
}

Bytes bits(const PackedMatrix& w) {
  const Form& form = w.any();
  Bytes out({static_cast<py::ssize_t>(form.rows()), static_cast<py::ssize_t>((form.cols() + 7) / 8)});
  std::uint8_t* const to = out.mutable_data();
  const PackedMatrix copy = w;
  const py::gil_scoped_release release;
  copy.bits(to);
  return out;
}

py::array values(const PackedMatrix& w) {
  const std::size_t nnz = w.any().nnz();
  const std::vector<py::ssize_t> shape{
      static_cast<py::ssize_t>(w.any().dtype() == DType::i4 ? (nnz + 1) / 2 : nnz)};
  py::array out(numpy_dtype(w.any().dtype()), shape);
  void* const to = out.mutable_data();
  const PackedMatrix copy = w;
  const py::gil_scoped_release release;
  copy.values(to);
  return out;
}

Floats scales(const PackedMatrix& w) {
  const Form& form = w.any();
  const bool int4 = form.dtype() == DType::i4, any = int4 || form.dtype() == DType::i8;
  const std::size_t width = form.header().width;
  std::vector<py::ssize_t> shape{static_cast<py::ssize_t>(any ? form.rows() : 0)};
  if (int4) shape.push_back(static_cast<py::ssize_t>((form.cols() + width - 1) / width));
  Floats out(shape);
  float* const to = out.mutable_data();
  const PackedMatrix copy = w;
  const Released released;
  if (any) copy.scales(to);
  return out;
}

std::size_t quad_rows_of(const PackedMatrix& w, std::size_t batch) {
  const FormPtr& form = w.find(FormKind::slots);
  return form == nullptr ? 0 : quad_rows(*form, batch);
}

Int8s levels(const PackedMatrix& w) {
  const bool int4 = w.any().dtype() == DType::i4;
  return Int8s(int4 ? 16 : 0, int4 ? w.any().levels() : nullptr);
}

py::array unpack(const PackedMatrix& w) {
  const Form& form = w.any();
  py::array out(numpy_dtype(form.dtype() > DType::f64 ? DType::f32 : form.dtype()),
                {static_cast<py::ssize_t>(form.rows()), static_cast<py::ssize_t>(form.cols())});
  void* const to = out.mutable_data();
  const PackedMatrix copy = w;
  const Released released;
  copy.unpack(to);
  return out;
}

}  // namespace

std::vector<std::string> form_names(const PackedMatrix& w) {
  std::vector<std::string> names;
  for (const FormKind kind : kFormKinds)
    if (w.find(kind) != nullptr) names.emplace_back(name_of(kind));
  return names;
}

FormPtr form_for(const PackedMatrix& w, const std::string& kernel) {
  FormPtr form = w.find(kind_of("kernel", kernel));
  if (form == nullptr)
    throw py::value_error(expected("kernel " + quoted(kernel), "only " + form_names(w).front(),
                                   "a form that the weight has",
                                   "build it with add(" + quoted(kernel) + ")"));
  const DType dtype = form->dtype();
  const bool expands = form->kind() == FormKind::bitmask && dtype == DType::i4;
  if ((dtype == DType::i8 || dtype == DType::i4) && form->kind() != FormKind::slots && !expands)
    throw py::value_error(expected("kernel", quoted(kernel),
                                   dtype == DType::i8 ? "slots, the kernel of int8 values"
                                                      : "slots or bitmask, the kernels of int4 values",
                                   "build its form with add()"));
  return form;
}

void register_packed(py::module_& m) {
  py::class_<PackedMatrix> packed(m, "Packed");
  packed.def_static("pack", &pack, py::arg("w"))
      .def_static("from_mask", &from_mask, py::arg("w"), py::arg("mask").noconvert())
      .def_static("from_parts", &from_parts, py::arg("rows"), py::arg("cols"), py::arg("bits"),
                  py::arg("values"))
      .def_static("pack_int8", &pack_quantised, py::arg("w").noconvert(), py::arg("scales").noconvert(),
                  py::arg("taps") = Pair{0, 0})
      .def_static("from_int8_parts", &from_int8_parts, py::arg("rows"), py::arg("cols"), py::arg("bits"),
                  py::arg("values").noconvert(), py::arg("scales").noconvert(), py::arg("taps") = Pair{0, 0})
      .def_static("pack_int4", &pack_levels, py::arg("w").noconvert(), py::arg("width"),
                  py::arg("scales").noconvert(), py::arg("levels").noconvert())
      .def_static("from_int4_parts", &from_int4_parts, py::arg("rows"), py::arg("cols"), py::arg("width"),
                  py::arg("bits"), py::arg("values").noconvert(), py::arg("scales").noconvert(),
                  py::arg("levels").noconvert())
      .def_static("from_buffers", &from_buffers, py::arg("buffers"), py::kw_only(),
                  py::arg("trusted") = false)
      .def_property_readonly("rows", [](const PackedMatrix& w) { return w.any().rows(); })
      .def_property_readonly("cols", [](const PackedMatrix& w) { return w.any().cols(); })
      .def_property_readonly("nnz", [](const PackedMatrix& w) { return w.any().nnz(); })
      .def_property_readonly("dtype", [](const PackedMatrix& w) { return name_of(w.any().dtype()); })
      .def_property_readonly(
          "width",
          [](const PackedMatrix& w) { return w.any().dtype() == DType::i4 ? w.any().header().width : 0; })
      .def_property_readonly(
          "taps", [](const PackedMatrix& w) { return Pair{w.any().taps().height, w.any().taps().width}; })
      .def_property_readonly("blocked", [](const PackedMatrix& w) { return w.any().header().shared_rows; })
      .def_property_readonly("forms",
                             [](const PackedMatrix& w) { return py::tuple(py::cast(form_names(w))); })
      .def_property_readonly("nbytes", &nbytes)
      .def("add", &add, py::arg("form"))
      .def("keep", &keep, py::arg("forms"))
      .def("buffer", &buffer, py::arg("form"))
      .def("bits", &bits)
      .def("values", &values)
      .def("scales", &scales)
      .def("levels", &levels)
      .def("quad_rows", &quad_rows_of, py::arg("batch"))
      .def("unpack", &unpack);
  add_products(packed);
}

}  // namespace sparsam
