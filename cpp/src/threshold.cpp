// Thresholds: of a pool of arrays, or of each array by itself.
#include <limits>

#include "order_statistic.hpp"
#include "sparsam/selection.hpp"

namespace sparsam {
namespace {

template <class Bits>
Threshold to_threshold(const Ranked<Bits>& r, DType type) {
  if (r.nan) return {std::numeric_limits<double>::quiet_NaN(), 0, 0};
  return {key_to_double(r.key, type), r.below, r.equal};
}

std::size_t scratch_elements(std::size_t bytes, std::size_t width) {
  return std::max(kScratchFloor, static_cast<std::size_t>(kScratchShare * static_cast<double>(bytes))) /
         width;
}

// The type in which keys of all arrays can be compared: their own, or the wider one where they differ.
DType common_dtype(Views arrays) {
  DType common = arrays[0].dtype();
  for (const View& v : arrays) {
    if (v.dtype() == common) continue;
    common = item_size(v.dtype()) == 8 || item_size(common) == 8 ? DType::f64 : DType::f32;
  }
  return common;
}

Threshold threshold_in_memory(const View& array, std::size_t k) {
  return with_bits(item_size(array.dtype()), [&](auto width) -> Threshold {
    using Bits = decltype(width);
    const auto infinity = static_cast<Bits>(infinity_key(array.dtype()));
    const ContiguousSource<Bits> source{array.direct<Bits>(0), array.size()};
    const std::size_t budget = scratch_elements(array.size() * sizeof(Bits), sizeof(Bits));
    return to_threshold(select(source, k, Bits{0}, infinity, infinity, budget), array.dtype());
  });
}

}  // namespace

Threshold threshold(Views arrays, std::size_t k) {
  if (arrays.size() == 1 && arrays[0].contiguous()) return threshold_in_memory(arrays[0], k);
  std::vector<View> by_memory;
  by_memory.reserve(arrays.size());
  std::size_t bytes = 0;
  for (const View& v : arrays) {
    bytes += v.size() * item_size(v.dtype());
    by_memory.push_back(v.in_memory_order());
  }
  if (by_memory.size() == 1 && by_memory[0].contiguous()) return threshold_in_memory(by_memory[0], k);
  const DType common = common_dtype(arrays);
  return with_bits(item_size(common), [&](auto width) -> Threshold {
    using Bits = decltype(width);
    const auto infinity = static_cast<Bits>(infinity_key(common));
    const std::size_t budget = scratch_elements(bytes, sizeof(Bits));
    return to_threshold(select(PooledSource<Bits>(by_memory), k, Bits{0}, infinity, infinity, budget),
                        common);
  });
}

Bracketed bracket(const View& array, double low, double high, std::size_t room, void* found) {
  const DType type = array.dtype();
  if (array.size() == 0) return {0, 0, 0, false};
  return with_bits(item_size(type), [&](auto width) -> Bracketed {
    using Bits = decltype(width);
    const std::vector<View> arrays{array.in_memory_order()};
    const auto lower = static_cast<Bits>(key_at_most(low, type));
    auto upper = static_cast<Bits>(key_at_most(high, type));
    // The least key that is not below `high`, which this type may be unable to hold.
    if (key_to_double(upper, type) < high) ++upper;
    const Pass pass =
        run_pass(PooledSource<Bits>(arrays), lower, upper, true, static_cast<Bits*>(found), room);
    const std::size_t upto = pass.counts.upto_low;
    const std::size_t equal =
        key_to_double(lower, type) == low ? upto - std::min(upto, pass.counts.below_low) : 0;
    return {upto - equal, equal, pass.inside, pass.counts.largest > infinity_key(type)};
  });
}

}  // namespace sparsam
