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
  if (k < 1 || k > total_size(views))
    throw py::value_error(
        expected("k", k, "1 to " + std::to_string(total_size(views)) + ", the elements", "pass another"));
  Threshold t{};
  {
    const Released released;
    t = threshold(views, k);
  }
  return py::make_tuple(t.value, t.below, t.equal);
}

// Memory for the masks of several arrays.
struct Masks {
  std::vector<Words> words;
  std::vector<std::uint64_t*> pointers;
  std::vector<Kept> kept;

  explicit Masks(const std::vector<View>& views) : kept(views.size()) {
    for (const View& v : views) {
      words.emplace_back(static_cast<py::ssize_t>(words_for(v.size())));
      pointers.push_back(words.back().mutable_data());
    }
  }
  // The words, from now on read-only, the counts of kept elements, and the counts of those that are not zero.
  py::tuple parts() const {
    for (const Words& w : words)
      py::detail::array_proxy(w.ptr())->flags &= ~py::detail::npy_api::NPY_ARRAY_WRITEABLE_;
    py::list all(kept.size()), nonzero(kept.size());
    for (std::size_t i = 0; i < kept.size(); ++i) {
      all[i] = kept[i].all;
      nonzero[i] = kept[i].nonzero;
    }
    return py::make_tuple(words, all, nonzero);
  }
};

std::vector<View> out_views(std::vector<py::array>& outs, const std::vector<View>& views) {
  if (!outs.empty() && outs.size() != views.size())
    throw py::value_error(expected("outs", outs.size(),
                                   "none, or one for each of " + std::to_string(views.size()) + " arrays",
                                   "pass as many"));
  std::vector<View> out;
  out.reserve(outs.size());
  for (std::size_t i = 0; i < outs.size(); ++i) out.push_back(out_view(outs[i], views[i]));
  return out;
}

py::tuple bind_threshold_mask(const std::vector<py::array>& arrays, double value, std::size_t ties_kept,
                              std::vector<py::array> outs) {
  const std::vector<View> views = views_of(arrays), to = out_views(outs, views);
  Masks masks(views);
  {
    const Released released;
    threshold_mask(views, value, ties_kept, masks.pointers.data(), to, masks.kept.data());
  }
  return masks.parts();
}

py::object bind_threshold_masks(const std::vector<py::array>& arrays, const std::vector<std::size_t>& counts,
                                std::vector<py::array> outs) {
  const std::vector<View> views = views_of(arrays), to = out_views(outs, views);
  if (counts.size() != views.size())
    throw py::value_error(expected("counts", counts.size(),
                                   "one for each of " + std::to_string(views.size()) + " arrays",
                                   "pass as many"));
  for (std::size_t i = 0; i < views.size(); ++i)
    if (counts[i] > views[i].size())
      throw py::value_error(expected("count of array " + std::to_string(i), counts[i],
                                     "at most its size, " + std::to_string(views[i].size()), "lower it"));
  Masks masks(views);
  bool numbers = false;
  {
    const Released released;
    numbers = threshold_masks(views, counts, masks.pointers.data(), to, masks.kept.data());
  }
  return numbers ? py::object(masks.parts()) : py::none();
}

py::object bind_bracket(const py::array& array, double low, double high, std::size_t room) {
  const View view = view_of(array);
  if (!(low >= 0 && low <= high))
    throw py::value_error(expected("low and high", std::to_string(low) + " and " + std::to_string(high),
                                   "0 <= low <= high", "pass the lower one first"));
  room = std::min(room, view.size());
  py::array found(array.dtype(), py::array::ShapeContainer{static_cast<py::ssize_t>(room)});
  void* to = found.mutable_data();
  Bracketed b{};
  {
    const Released released;
    b = bracket(view, low, high, room, to);
  }
  if (b.nan) return py::none();
  if (b.inside > room) return py::make_tuple(b.below, b.equal, b.inside, py::none());
  const py::slice filled(0, static_cast<py::ssize_t>(b.inside), 1);
  return py::make_tuple(b.below, b.equal, b.inside, found[filled]);
}

/// The words of the mask of `view` that `make` writes; None if it returns false, as for a NaN.
template <class Make>
py::object mask_or_none(const View& view, const Make& make) {
  Words words(static_cast<py::ssize_t>(words_for(view.size())));
  std::uint64_t* to = words.mutable_data();
  bool numbers = false;
  {
    const Released released;
    numbers = make(to);
  }
  return numbers ? py::object(words) : py::none();
}

py::object bind_nm_mask(const py::array& array, std::size_t keep, std::size_t m) {
  const View view = view_of(array);
  if (m < 1 || m > 256 || keep > m || view.size() % m != 0)
    throw py::value_error(expected("keep and m", std::to_string(keep) + " and " + std::to_string(m),
                                   "keep <= m <= 256, and m to divide the size", "pass others"));
  return mask_or_none(view, [&](std::uint64_t* to) { return nm_mask(view, keep, m, to); });
}

py::object bind_row_topk_mask(const py::array& array, std::size_t cols, std::size_t pruned) {
  const View view = view_of(array);
  if (cols < 1 || pruned < 1 || pruned > cols || view.size() % cols != 0)
    throw py::value_error(expected("pruned and cols", std::to_string(pruned) + " and " + std::to_string(cols),
                                   "1 <= pruned <= cols, and cols to divide the size", "pass others"));
  return mask_or_none(view, [&](std::uint64_t* to) { return row_topk_mask(view, cols, pruned, to); });
}

py::object bind_find_nan(const std::vector<py::array>& arrays) {
  const std::vector<View> views = views_of(arrays);
  Position p{};
  {
    const Released released;
    p = find_nan(views);
  }
  return p.found ? py::object(py::make_tuple(p.array, p.index)) : py::none();
}

std::size_t bind_count_nonzero(const py::array& array) {
  const View view = view_of(array);
  const Released released;
  return count_nonzero(view);
}

py::array_t<double> bind_tile_scores(const py::array& array, std::size_t rows, std::size_t cols,
                                     std::size_t tile_rows, std::size_t tile_cols, int norm) {
  const View view = view_of(array);
  const Tiling tiling = tiling_of(rows, cols, tile_rows, tile_cols);
  if (rows * cols != view.size())
    throw py::value_error(expected("array", view.size(), std::to_string(rows * cols) + " elements",
                                   "pass rows and columns of that product"));
  if (norm != 1 && norm != 2) throw py::value_error(expected("norm", norm, "1 or 2", "pass one of them"));
  py::array_t<double> scores(
      {static_cast<py::ssize_t>(tiling.down()), static_cast<py::ssize_t>(tiling.across())});
  double* to = scores.mutable_data();
  const Released released;
  tile_scores(view, tiling, norm, to);
  return scores;
}

}  // namespace

void register_selection(py::module_& m) {
  m.def("threshold", &bind_threshold, py::arg("arrays"), py::arg("k"));
  m.def("threshold_mask", &bind_threshold_mask, py::arg("arrays"), py::arg("value"), py::arg("ties_kept"),
        py::arg("outs"));
  m.def("threshold_masks", &bind_threshold_masks, py::arg("arrays"), py::arg("counts"), py::arg("outs"));
  m.def("bracket", &bind_bracket, py::arg("array"), py::arg("low"), py::arg("high"), py::arg("room"));
  m.def("nm_mask", &bind_nm_mask, py::arg("array"), py::arg("keep"), py::arg("m"));
  m.def("row_topk_mask", &bind_row_topk_mask, py::arg("array"), py::arg("cols"), py::arg("pruned"));
  m.def("find_nan", &bind_find_nan, py::arg("arrays"));
  m.def("count_nonzero", &bind_count_nonzero, py::arg("array"));
  m.def("tile_scores", &bind_tile_scores, py::arg("array"), py::arg("rows"), py::arg("cols"),
        py::arg("tile_rows"), py::arg("tile_cols"), py::arg("norm"));
}

}  // namespace sparsam
