#include "arrays.hpp"
#include "sparsam/masks.hpp"
#include "sparsam/tiles.hpp"

namespace sparsam {
namespace {

std::size_t count(const Words& words) {
  return count_bits(words.data(), static_cast<std::size_t>(words.size()));
}

std::size_t apply(const py::array& array, const Words& words, py::array out) {
  const View view = view_of(array), to = out_view(out, view);
  const std::uint64_t* bits = checked_words(words, view.size());
  const Released released;
  return apply_mask(view, bits, to);
}

Words expand(const Words& tile_words, std::size_t rows, std::size_t cols, std::size_t tile_rows,
             std::size_t tile_cols) {
  const Tiling tiling = tiling_of(rows, cols, tile_rows, tile_cols);
  const std::uint64_t* tiles = checked_words(tile_words, tiling.down() * tiling.across());
  Words words(static_cast<py::ssize_t>(words_for(rows * cols)));
  std::uint64_t* to = words.mutable_data();
  const Released released;
  expand_tiles(tiles, tiling, to);
  return words;
}

// First and past-the-last byte of each array.
py::array_t<std::uint64_t> byte_ranges(const std::vector<py::array>& arrays) {
  py::array_t<std::uint64_t> ranges({static_cast<py::ssize_t>(arrays.size()), py::ssize_t{2}});
  std::uint64_t* to = ranges.mutable_data();
  for (const py::array& a : arrays) {
    std::uint64_t start = reinterpret_cast<std::uintptr_t>(a.data()), end = start;
    for (py::ssize_t i = 0; i < a.ndim(); ++i) {
      const py::ssize_t reach = (a.shape(i) - 1) * a.strides(i);
      (reach < 0 ? start : end) += static_cast<std::uint64_t>(reach);
    }
    *to++ = start;
    *to++ = a.size() == 0 ? start : end + static_cast<std::uint64_t>(a.itemsize());
  }
  return ranges;
}

}  // namespace

void register_masks(py::module_& m) {
  m.def("byte_ranges", &byte_ranges, py::arg("arrays"));
  m.def("count_bits", &count, py::arg("words"));
  m.def("apply_mask", &apply, py::arg("array"), py::arg("words"), py::arg("out"));
  m.def("expand_tiles", &expand, py::arg("tile_words"), py::arg("rows"), py::arg("cols"),
        py::arg("tile_rows"), py::arg("tile_cols"));
}

}  // namespace sparsam
