#include "arrays.hpp"
#include "sparsam/moments.hpp"

namespace sparsam {
namespace {

template <class T>
using Plain = py::array_t<T, py::array::c_style>;

template <class T>
ScaledMatrix<T> scaled(const char* name, const Plain<T>& matrix, const Plain<double>& scale) {
  if (matrix.ndim() != 2 || scale.ndim() != 1 || scale.shape(0) != matrix.shape(1))
    throw py::value_error(expected(name, shape_text(matrix) + " and " + shape_text(scale),
                                   "a matrix and a number for each column", "reshape them"));
  return {matrix.data(), static_cast<std::size_t>(matrix.shape(0)), static_cast<std::size_t>(matrix.shape(1)),
          scale.data()};
}

template <class T>
void bind_add_products(Plain<double> tiles, const Plain<T>& a, const Plain<double>& a_scale,
                       const Plain<T>& b, const Plain<double>& b_scale,
                       std::pair<std::size_t, std::size_t> edges, bool upper) {
  const ScaledMatrix<T> left = scaled("a", a, a_scale), right = scaled("b", b, b_scale);
  if (left.rows != right.rows || (upper && left.cols != right.cols))
    throw py::value_error(expected("a and b", shape_text(a) + " and " + shape_text(b),
                                   "the same number of rows, and of columns with upper", "pass others"));
  for (const std::size_t edge : {edges.first, edges.second})
    if (edge == 0 || edge % 32 != 0 || edge > kMomentTile)
      throw py::value_error(expected("edges", edge, "multiples of 32 up to 128", "pass such"));
  if (upper && edges.first != edges.second)
    throw py::value_error(expected("edges", "different ones", "two alike with upper", "pass such"));
  const std::size_t n = moment_numbers(left.cols, right.cols, edges.first, edges.second, upper);
  if (!tiles.writeable() || static_cast<std::size_t>(tiles.size()) != n)
    throw py::value_error(
        expected("tiles", shape_text(tiles), std::to_string(n) + " writeable numbers", "make them again"));
  double* to = tiles.mutable_data();
  const Released released;
  add_products(left, right, edges.first, edges.second, upper, to);
}

template <class T>
void register_add_products(py::module_& m) {
  m.def("add_products", &bind_add_products<T>, py::arg("tiles").noconvert(), py::arg("a").noconvert(),
        py::arg("a_scale").noconvert(), py::arg("b").noconvert(), py::arg("b_scale").noconvert(),
        py::arg("edges"), py::arg("upper"));
}

}  // namespace

void register_moments(py::module_& m) {
  register_add_products<float>(m);
  register_add_products<double>(m);
}

}  // namespace sparsam
