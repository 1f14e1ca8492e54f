// NumPy arrays as views: the only place that checks types and raises their errors. Include first.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include "sparsam/errors.hpp"
#include "sparsam/float_mode.hpp"
#include "sparsam/masks.hpp"
#include "sparsam/tiles.hpp"
#include "sparsam/views.hpp"

namespace sparsam {

namespace py = pybind11;

inline DType dtype_of(const py::array& a) {
  const py::dtype t = a.dtype();
  if (t.byteorder() == '=' || t.byteorder() == '|' || t.byteorder() == '<') {
    if (t.kind() == 'f') {
      if (t.itemsize() == 2) return DType::f16;
      if (t.itemsize() == 4) return DType::f32;
      if (t.itemsize() == 8) return DType::f64;
    } else if (t.itemsize() == 2 && t.attr("name").cast<std::string>() == "bfloat16") {
      return DType::bf16;  // ml_dtypes registers it as a type of its own
    }
  }
  throw py::type_error(expected("array", "dtype " + py::str(py::handle(t)).cast<std::string>(),
                                "float16, bfloat16, float32 or float64 in native byte order",
                                "convert it with .astype()"));
}

inline std::string shape_text(const py::array& a) {
  return "shape " + py::str(a.attr("shape")).cast<std::string>();
}

inline View view_of(const py::array& a) {
  std::vector<Dim> dims;
  for (py::ssize_t i = 0; i < a.ndim(); ++i)
    dims.push_back({static_cast<std::size_t>(a.shape(i)), static_cast<std::ptrdiff_t>(a.strides(i))});
  return View(const_cast<void*>(a.data()), dtype_of(a), dims);
}

inline std::vector<View> views_of(const std::vector<py::array>& arrays) {
  std::vector<View> views;
  views.reserve(arrays.size());
  for (const py::array& a : arrays) views.push_back(view_of(a));
  return views;
}

// `out` must be writeable and match `like`.
inline View out_view(py::array& out, const View& like) {
  if (!out.writeable())
    throw py::value_error(expected("out", "one that is read-only", "a writeable array", "pass a copy"));
  const View view = view_of(out);
  if (view.size() != like.size() || view.dtype() != like.dtype())
    throw py::value_error(expected("out", shape_text(out) + " of another size or dtype",
                                   "the shape and dtype of the input", "pass np.empty_like of that"));
  return view;
}

// While C++ code runs: the GIL is released, and arithmetic follows IEEE 754 whatever the caller's mode.
struct Released {
  StandardFloats floats;
  py::gil_scoped_release released;
};

// Words of a mask, as a Mask holds them.
using Words = py::array_t<std::uint64_t, py::array::c_style>;

inline const std::uint64_t* checked_words(const Words& words, std::size_t n) {
  if (static_cast<std::size_t>(words.size()) != words_for(n))
    throw py::value_error(
        expected("mask", std::to_string(words.size()) + " words",
                 std::to_string(words_for(n)) + " words for " + std::to_string(n) + " elements",
                 "pass the mask of this array"));
  return words.data();
}

// Tiles larger than the matrix are cut to it.
inline Tiling tiling_of(std::size_t rows, std::size_t cols, std::size_t tile_rows, std::size_t tile_cols) {
  if (tile_rows < 1 || tile_cols < 1)
    throw py::value_error(expected("tiles", std::to_string(tile_rows) + " x " + std::to_string(tile_cols),
                                   "at least 1 x 1", "enlarge them"));
  return {rows, cols, std::min(tile_rows, std::max<std::size_t>(rows, 1)),
          std::min(tile_cols, std::max<std::size_t>(cols, 1))};
}

void register_masks(py::module_& m);
void register_packed(py::module_& m);
void register_moments(py::module_& m);
void register_reconstruction(py::module_& m);
void register_attention(py::module_& m);
void register_interleave(py::module_& m);
void register_recurrent(py::module_& m);
void register_runtime(py::module_& m);
void register_selection(py::module_& m);
void register_steps(py::module_& m);
void register_guards(py::module_& m);
void register_tensors(py::module_& m);

}  // namespace sparsam
