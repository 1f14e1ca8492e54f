// The rows in the lanes of slots of integer values.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace sparsam {

/// What is wrong with the rows of `lanes` lanes: "" if every row is in one lane, with good scales. A lane
/// without a row has w.rows in its place.
template <class SlotsView, class GoodScales>
std::string fault_of_rows(const SlotsView& w, std::size_t lanes, const GoodScales& good_scales) {
  std::vector<bool> seen(w.rows);
  std::size_t rows = 0;
  for (std::size_t lane = 0; lane < lanes; ++lane) {
    if (w.row[lane] == w.rows) continue;
    if (w.row[lane] > w.rows || seen[w.row[lane]]) return "expected every row once";
    seen[w.row[lane]] = true;
    ++rows;
    if (!good_scales(lane)) return "expected scales that are positive, normal numbers";
  }
  return rows == w.rows ? "" : "expected every row once";
}

}  // namespace sparsam
