#include "packed.hpp"
#include "sparsam/matmul.hpp"
#include "tensors.hpp"

#include <vector>

namespace sparsam {
namespace {

// DLPackExchangeAPI, as far as it is read.
struct Table {
  std::uint32_t major;
  std::uint32_t minor;
  Table* previous;
  void* allocate;
  void* from_object;
  void* to_object;
  int (*view)(void* object, TensorView* out);
};

const Table* table = nullptr;  // set once, under the GIL

// Whether the table is one that is understood here.
bool use_tensors(const py::capsule& capsule) {
  const auto* const found = capsule.get_pointer<Table>();
  if (found->major != 1 || found->view == nullptr) return false;
  table = found;
  return true;
}

// x.new_empty(*x.shape[:-1], rows): as numbers, which PyTorch reads faster than a tuple.
py::object new_tensor(const py::object& x, const TensorView& view, std::size_t rows) {
  static PyObject* const name = PyUnicode_InternFromString("new_empty");
  std::vector<py::object> sizes;
  std::vector<PyObject*> args{x.ptr()};
  for (std::int32_t i = 0; i + 1 < view.ndim; ++i) sizes.emplace_back(py::int_(view.shape[i]));
  sizes.emplace_back(py::int_(rows));
  for (const py::object& size : sizes) args.push_back(size.ptr());
  PyObject* const made = PyObject_VectorcallMethod(name, args.data(), args.size(), nullptr);
  if (made == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(made);
}

// activation(x W^T + bias) as a new tensor like x, with nothing on the way that a small product would feel;
// None unless x is plain float32 or bfloat16 with that many columns, and bias None or as many plain float32
// numbers.
py::object linear_of_tensors(const PackedMatrix& w, const py::object& kernel_for, const py::object& x,
                             const py::object& bias, const std::string& activation) {
  TensorView from{}, add{}, to{};
  const std::size_t rows = w.any().rows(), cols = w.any().cols();
  if (!view_of_tensor(x, from) || from.ndim < 1 || !from.is_plain()) return py::none();
  const std::int64_t width = from.shape[from.ndim - 1];
  if (static_cast<std::size_t>(width) != cols || !(from.is_float32() || from.is_bfloat16()))
    return py::none();
  if (!bias.is_none() &&
      (!view_of_tensor(bias, add) || add.ndim != 1 || static_cast<std::size_t>(add.shape[0]) != rows ||
       !add.is_plain() || !add.is_float32()))
    return py::none();
  std::size_t batch = 1;
  for (std::int32_t i = 0; i + 1 < from.ndim; ++i) batch *= static_cast<std::size_t>(from.shape[i]);
  if (batch == 0 || rows == 0 || cols == 0) return py::none();
  const py::object y = new_tensor(x, from, rows);
  if (!view_of_tensor(y, to)) return py::none();
  const FormPtr form = form_for(w, kernel_for(batch).cast<std::string>());
  const bool narrow = from.is_bfloat16();
  const float* const numbers = add.as<float>();
  const py::gil_scoped_release release;
  if (narrow)
    linear(*form, from.as<std::uint16_t>(), batch, numbers, activation, to.as<std::uint16_t>());
  else
    linear(*form, from.as<float>(), batch, numbers, activation, to.as<float>());
  return y;
}

}  // namespace

bool view_of_tensor(py::handle tensor, TensorView& view) {
  if (table == nullptr) return false;
  if (table->view(tensor.ptr(), &view) == 0) return true;
  PyErr_Clear();
  return false;
}

void register_tensors(py::module_& m) {
  m.def("use_tensors", &use_tensors, py::arg("table"));
  m.def("linear_of_tensors", &linear_of_tensors, py::arg("weight"), py::arg("kernel_for"), py::arg("x"),
        py::arg("bias"), py::arg("activation"));
}

}  // namespace sparsam
