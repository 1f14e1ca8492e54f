#include "arrays.hpp"
#include "sparsam/reconstruction.hpp"

namespace sparsam {
namespace {

template <class T>
using Matrix = py::array_t<T, py::array::c_style>;
using Keep = Matrix<bool>;
using Indices = Matrix<std::int64_t>;

void check_matrix(const char* name, const py::array& a, py::ssize_t rows, py::ssize_t cols, bool written) {
  if (a.ndim() != 2 || a.shape(0) != rows || a.shape(1) != cols)
    throw py::value_error(expected(name, shape_text(a),
                                   "shape (" + std::to_string(rows) + ", " + std::to_string(cols) + ")",
                                   "pass one of that shape"));
  if (written && !a.writeable())
    throw py::value_error(expected(name, "one that is read-only", "a writeable array", "pass a copy"));
}

template <class T>
Sweep<T> checked_sweep(Matrix<T>& w, const Matrix<T>& u, Keep& keep, Matrix<T>& errors, std::size_t first,
                       std::size_t cols) {
  if (w.ndim() != 2) throw py::value_error(expected("w", shape_text(w), "a matrix", "reshape it"));
  check_matrix("w", w, w.shape(0), w.shape(1), true);
  check_matrix("u", u, w.shape(1), w.shape(1), false);
  check_matrix("keep", keep, w.shape(0), w.shape(1), true);
  check_matrix("errors", errors, w.shape(0), w.shape(1), true);
  const auto rows = static_cast<std::size_t>(w.shape(0)), stride = static_cast<std::size_t>(w.shape(1));
  if (cols < 1 || cols > kSweepColumns || first > stride || cols > stride - first)
    throw py::value_error(expected("columns", std::to_string(first) + " to " + std::to_string(first + cols),
                                   "1 to 256 that the matrix has", "pass fewer"));
  return {w.mutable_data(),
          reinterpret_cast<std::uint8_t*>(keep.mutable_data()),
          errors.mutable_data(),
          u.data(),
          rows,
          stride};
}

template <class T>
void propagate_errors(Matrix<T> w, const Matrix<T>& u, Keep keep, Matrix<T> errors, std::size_t first,
                      std::size_t cols) {
  const Sweep<T> matrix = checked_sweep(w, u, keep, errors, first, cols);
  const Released released;
  matrix.propagate_errors(first, cols);
}

template <class T>
void sweep(Matrix<T> w, const Matrix<T>& u, Keep keep, Matrix<T> errors, std::size_t first, std::size_t cols,
           std::size_t n, std::size_t m) {
  const Sweep<T> matrix = checked_sweep(w, u, keep, errors, first, cols);
  if (m != 0 && (n > m || cols % m != 0))
    throw py::value_error(expected("n and m", std::to_string(n) + " and " + std::to_string(m),
                                   "n <= m, and m to divide the columns", "pass others"));
  const Released released;
  matrix.sweep(first, cols, n, m);
}

template <class T>
void rounding_sweep(Matrix<T> w, const Matrix<T>& u, Keep keep, Matrix<T> errors, std::size_t first,
                    std::size_t cols, const Matrix<T>& scales, std::size_t group, int most) {
  const Sweep<T> matrix = checked_sweep(w, u, keep, errors, first, cols);
  if (group < 1 || most < 1 || most > 127)
    throw py::value_error(expected("group and most", std::to_string(group) + " and " + std::to_string(most),
                                   "at least 1, and 1 to 127", "pass others"));
  const std::size_t groups = (matrix.stride + group - 1) / group;
  check_matrix("scales", scales, w.shape(0), static_cast<py::ssize_t>(groups), false);
  const Released released;
  matrix.rounding_sweep(first, cols, {scales.data(), groups, group, static_cast<T>(most)});
}

void solve(const Matrix<double>& h, const Keep& keep, Matrix<double> sides, const Indices& order,
           const Indices& starts, double tolerance) {
  if (h.ndim() != 2) throw py::value_error(expected("h", shape_text(h), "a matrix", "reshape it"));
  check_matrix("h", h, h.shape(1), h.shape(1), false);
  const py::ssize_t rows = keep.ndim() == 2 ? keep.shape(0) : 0, groups = starts.size() - 1;
  check_matrix("keep", keep, rows, h.shape(1), false);
  check_matrix("sides", sides, rows, h.shape(1), true);
  if (groups < 0 || starts.data()[0] != 0 || starts.data()[groups] != order.size())
    throw py::value_error(expected("starts", "others", "0, ..., the length of order", "correct them"));
  for (py::ssize_t g = 0; g < groups; ++g)
    if (starts.data()[g] >= starts.data()[g + 1])
      throw py::value_error(expected("starts", "others", "increasing numbers", "sort them"));
  for (py::ssize_t i = 0; i < order.size(); ++i)
    if (order.data()[i] < 0 || order.data()[i] >= rows)
      throw py::value_error(expected("order", order.data()[i], "row numbers", "correct them"));
  const SupportSystems systems{h.data(),
                               reinterpret_cast<const std::uint8_t*>(keep.data()),
                               sides.mutable_data(),
                               static_cast<std::size_t>(h.shape(1)),
                               order.data(),
                               starts.data(),
                               static_cast<std::size_t>(groups),
                               tolerance};
  const Released released;
  systems.solve();
}

template <class T>
void register_sweep(py::module_& m) {
  m.def("propagate_errors", &propagate_errors<T>, py::arg("w").noconvert(), py::arg("u").noconvert(),
        py::arg("keep").noconvert(), py::arg("errors").noconvert(), py::arg("first"), py::arg("cols"));
  m.def("sweep", &sweep<T>, py::arg("w").noconvert(), py::arg("u").noconvert(), py::arg("keep").noconvert(),
        py::arg("errors").noconvert(), py::arg("first"), py::arg("cols"), py::arg("n"), py::arg("m"));
  m.def("rounding_sweep", &rounding_sweep<T>, py::arg("w").noconvert(), py::arg("u").noconvert(),
        py::arg("keep").noconvert(), py::arg("errors").noconvert(), py::arg("first"), py::arg("cols"),
        py::arg("scales").noconvert(), py::arg("group"), py::arg("most"));
}

}  // namespace

void register_reconstruction(py::module_& m) {
  register_sweep<float>(m);
  register_sweep<double>(m);
  m.def("masked_least_squares", &solve, py::arg("h").noconvert(), py::arg("keep").noconvert(),
        py::arg("sides").noconvert(), py::arg("order").noconvert(), py::arg("starts").noconvert(),
        py::arg("tolerance"));
}

}  // namespace sparsam
