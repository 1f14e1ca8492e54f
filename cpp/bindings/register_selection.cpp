#include "arrays.hpp"
#include "sparsam/selection.hpp"
#include "sparsam/tiles.hpp"

namespace sparsam {
namespace {

std::size_t total_size(const std::vector<View>& views) {
  std::size_t n = 0;
  for (const View& v : views) n += v.size();
  return n;
}

py::tuple bind_threshold(const std::vector<py::array>& arrays, std::size_t k) {
  const std::vector<View> views = views_of(arrays);
  if (k < 1 || k > total_size(views)) throw py::value_error("k must lie in [1, number of elements]");
  Threshold t{};
  {
    py::gil_scoped_release release;
    t = threshold(views, k);
  }
  return py::make_tuple(t.value, t.below, t.equal);
}

std::vector<Words> bind_mark(const std::vector<py::array>& arrays, double value, std::size_t ties_kept,
                             std::vector<py::array> outs) {
  const std::vector<View> views = views_of(arrays);
  std::vector<View> out_views;
  if (!outs.empty() && outs.size() != arrays.size())
    throw py::value_error("outs must be empty or match arrays");
  for (std::size_t i = 0; i < outs.size(); ++i) out_views.push_back(out_view(outs[i], views[i]));
  std::vector<Words> words;
  std::vector<std::uint64_t*> pointers;
  for (const View& v : views) {
    words.emplace_back(static_cast<py::ssize_t>(words_for(v.size())));
    pointers.push_back(words.back().mutable_data());
  }
  py::gil_scoped_release release;
  mark(views, value, ties_kept, pointers, out_views);
  return words;
}

py::object bind_keep_of_group(const py::array& array, std::size_t keep, std::size_t m) {
  const View view = view_of(array);
  if (m < 1 || m > 256 || keep > m || view.size() % m != 0)
    throw py::value_error("expected keep <= m <= 256, and m to divide the size");
  Words words(static_cast<py::ssize_t>(words_for(view.size())));
  std::uint64_t* to = words.mutable_data();
  bool numbers = false;
  {
    py::gil_scoped_release release;
    numbers = keep_of_group(view, keep, m, to);
  }
  return numbers ? py::object(words) : py::none();
}

py::object bind_keep_of_row(const py::array& array, std::size_t cols, std::size_t k) {
  const View view = view_of(array);
  if (cols < 1 || k < 1 || k > cols || view.size() % cols != 0)
    throw py::value_error("expected 1 <= k <= cols, and cols to divide the size");
  Words words(static_cast<py::ssize_t>(words_for(view.size())));
  std::uint64_t* to = words.mutable_data();
  bool numbers = false;
  {
    py::gil_scoped_release release;
    numbers = keep_of_row(view, cols, k, to);
  }
  return numbers ? py::object(words) : py::none();
}

py::object bind_find_nan(const std::vector<py::array>& arrays) {
  const std::vector<View> views = views_of(arrays);
  Position p{};
  {
    py::gil_scoped_release release;
    p = find_nan(views);
  }
  return p.found ? py::object(py::make_tuple(p.array, p.index)) : py::none();
}

py::array_t<double> bind_tile_scores(const py::array& array, std::size_t rows, std::size_t cols,
                                     std::size_t tile_rows, std::size_t tile_cols, int norm) {
  const View view = view_of(array);
  const Tiling tiling = tiling_of(rows, cols, tile_rows, tile_cols);
  if (rows * cols != view.size() || (norm != 1 && norm != 2))
    throw py::value_error("expected rows * cols elements, and norm 1 or 2");
  py::array_t<double> scores(
      {static_cast<py::ssize_t>(tiling.down()), static_cast<py::ssize_t>(tiling.across())});
  double* to = scores.mutable_data();
  py::gil_scoped_release release;
  tile_scores(view, tiling, norm, to);
  return scores;
}

}  // namespace

void register_selection(py::module_& m) {
  m.def("threshold", &bind_threshold, py::arg("arrays"), py::arg("k"));
  m.def("mark", &bind_mark, py::arg("arrays"), py::arg("value"), py::arg("ties_kept"), py::arg("outs"));
  m.def("keep_of_group", &bind_keep_of_group, py::arg("array"), py::arg("keep"), py::arg("m"));
  m.def("keep_of_row", &bind_keep_of_row, py::arg("array"), py::arg("cols"), py::arg("k"));
  m.def("find_nan", &bind_find_nan, py::arg("arrays"));
  m.def("tile_scores", &bind_tile_scores, py::arg("array"), py::arg("rows"), py::arg("cols"),
        py::arg("tile_rows"), py::arg("tile_cols"), py::arg("norm"));
}

}  // namespace sparsam
