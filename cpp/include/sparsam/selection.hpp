// Exact selection by magnitude over one array or many.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "sparsam/views.hpp"

namespace sparsam {

struct Threshold {
  double value;       // the k-th smallest magnitude; NaN where a NaN was seen
  std::size_t below;  // how many are smaller
  std::size_t equal;  // how many are equal
};

// The k-th smallest magnitude over all arrays, 1 <= k <= total size. Reads the data once as a rule, and
// copies little of it: scratch is at most 5 % of the data, or 128 KiB where that is more. The answer depends
// on the values alone.
Threshold threshold(const std::vector<View>& arrays, std::size_t k);

// Keep bits of each array (ceil(size / 64) words) and, unless outs is empty, the arrays with pruned elements
// as +0. Pruned are the magnitudes below t.value and, of those equal to it, all but the first `ties_kept` in
// the order of the arrays and their C order. outs[i] has the type and shape of arrays[i] and may be the same
// memory.
void mark(const std::vector<View>& arrays, double value, std::size_t ties_kept,
          const std::vector<std::uint64_t*>& words, const std::vector<View>& outs);

// Keeps the `keep` largest of every m consecutive elements in C order (m divides the size, m <= 256), ties to
// the lower index. Returns false where a NaN was seen; words are then meaningless.
bool keep_of_group(const View& array, std::size_t keep, std::size_t m, std::uint64_t* words);

// Of every row of `cols` consecutive elements in C order (cols divides the size) all but the k smallest
// magnitudes are kept, 1 <= k <= cols, ties to the lower index. Returns false where a NaN was seen; words are
// then meaningless.
bool keep_of_row(const View& array, std::size_t cols, std::size_t k, std::uint64_t* words);

struct Position {
  std::size_t array, index;
  bool found;
};
Position find_nan(const std::vector<View>& arrays);  // the first one

}  // namespace sparsam
