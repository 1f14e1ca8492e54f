// Exact selection by magnitude over one array or many. If another thread writes to an array during a call,
// the answer is meaningless, but the call is safe.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "sparsam/kept.hpp"
#include "sparsam/views.hpp"

namespace sparsam {

struct Threshold {
  double value;       // the k-th smallest magnitude; NaN if a NaN was seen
  std::size_t below;  // how many are smaller
  std::size_t equal;  // how many are equal

  // How many of the equal ones are kept so that k are pruned.
  std::size_t ties_kept(std::size_t k) const {
    return k <= below ? equal : below + equal - std::min(k, below + equal);
  }
};

// The k-th smallest magnitude over all arrays, 1 <= k <= total size. Usually reads the data once, and copies
// little of it: scratch memory is at most 5 % of the data, or 128 KiB if that is more. The answer depends
// only on the values.
Threshold threshold(Views arrays, std::size_t k);

// How many magnitudes of one array are below, at and between two values, low <= high.
struct Bracketed {
  std::size_t below;   // how many are smaller than low
  std::size_t equal;   // how many are low
  std::size_t inside;  // how many lie strictly between low and high
  bool nan;            // a NaN was seen; the counts mean nothing
};

// Counts in one read, so that a threshold over data that memory does not hold can be found a piece at a time.
// The magnitudes between the two go to `found`, in the array's type and in no order, if there are at most
// `room` of them.
Bracketed bracket(const View& array, double low, double high, std::size_t room, void* found);

// Keep bits of each array (ceil(size / 64) words) and, unless outs is empty, the arrays with pruned elements
// as +0. Pruned are the magnitudes below `value` and, of those equal to it, all but the first `ties_kept` in
// the order of the arrays and their C order. outs[i] has the type and shape of arrays[i] and may be the same
// memory. kept[i]: what is kept of arrays[i].
void threshold_mask(Views arrays, double value, std::size_t ties_kept, std::uint64_t* const* words,
                    Views outs, Kept* kept);

// The same for each array by itself, with the threshold that prunes counts[i] of its elements: many small
// arrays in one call. Returns false where a NaN was seen. An array of outs is written as a whole or not at
// all.
bool threshold_masks(Views arrays, const std::vector<std::size_t>& counts, std::uint64_t* const* words,
                     Views outs, Kept* kept);

// Keeps the `keep` largest of every m consecutive elements in C order (m divides the size, m <= 256), ties to
// the lower index. Returns false where a NaN was seen; words are then meaningless.
bool nm_mask(const View& array, std::size_t keep, std::size_t m, std::uint64_t* words);

// Of every row of `cols` consecutive elements in C order (cols divides the size) all but the `pruned`
// smallest magnitudes are kept, 1 <= pruned <= cols, ties to the lower index. Returns false where a NaN was
// seen; words are then meaningless.
bool row_topk_mask(const View& array, std::size_t cols, std::size_t pruned, std::uint64_t* words);

struct Position {
  std::size_t array, index;
  bool found;
};
Position find_nan(const std::vector<View>& arrays);  // the first one
std::size_t count_nonzero(const View& array);

}  // namespace sparsam
