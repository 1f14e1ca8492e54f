#include <cstddef>

#include "arrays.hpp"
#include "tensors.hpp"

namespace sparsam {
namespace {

// Stateless, and over tuples that Python owns: an object of the core that held modules would keep whole
// models alive, since the garbage collector does not look into it.

// Whether each dictionary has, by identity, that value under that name, or not the name where the value is
// `absent`; all of `empty` have no items, and all objects are of those classes, exactly.
bool unchanged(const py::tuple& tables, const py::tuple& names, const py::tuple& values, py::handle absent,
               const py::tuple& empty, const py::tuple& objects, const py::tuple& kinds) {
  if (names.size() != tables.size() || values.size() != tables.size() || kinds.size() != objects.size())
    return false;
  for (py::size_t i = 0; i < tables.size(); ++i) {
    PyObject* const table = PyTuple_GET_ITEM(tables.ptr(), i);
    if (!PyDict_Check(table)) return false;
    PyObject* const found = PyDict_GetItemWithError(table, PyTuple_GET_ITEM(names.ptr(), i));
    if (found == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
    if ((found == nullptr ? absent.ptr() : found) != PyTuple_GET_ITEM(values.ptr(), i)) return false;
  }
  for (py::size_t i = 0; i < empty.size(); ++i) {
    PyObject* const table = PyTuple_GET_ITEM(empty.ptr(), i);
    if (!PyDict_Check(table) || PyDict_Size(table) != 0) return false;
  }
  for (py::size_t i = 0; i < objects.size(); ++i) {
    PyObject* const kind = reinterpret_cast<PyObject*>(Py_TYPE(PyTuple_GET_ITEM(objects.ptr(), i)));
    if (kind != PyTuple_GET_ITEM(kinds.ptr(), i)) return false;
  }
  return true;
}

// The address of number `starts[i]` of each tensor; None unless all are vectors of so many plain float32
// numbers.
py::object vector_addresses(const py::tuple& tensors, const py::tuple& sizes, const py::tuple& starts) {
  if (sizes.size() != tensors.size() || starts.size() != tensors.size()) return py::none();
  py::list found(tensors.size());
  for (py::size_t i = 0; i < tensors.size(); ++i) {
    TensorView view{};
    if (!view_of_tensor(tensors[i], view) || view.ndim != 1 || !view.is_plain() || !view.is_float32() ||
        view.shape[0] != sizes[i].cast<std::int64_t>())
      return py::none();
    const auto start = starts[i].cast<std::size_t>();
    found[i] = py::int_(reinterpret_cast<std::uintptr_t>(view.as<float>() + start));
  }
  return found;
}

}  // namespace

void register_guards(py::module_& m) {
  m.def("unchanged", &unchanged, py::arg("tables"), py::arg("names"), py::arg("values"), py::arg("absent"),
        py::arg("empty"), py::arg("objects"), py::arg("kinds"));
  m.def("vector_addresses", &vector_addresses, py::arg("tensors"), py::arg("sizes"), py::arg("starts"));
}

}  // namespace sparsam
