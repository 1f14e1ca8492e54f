// Slots of int8 values of any geometry, entry by entry: the oracle of the others, and what multiplies with a
// form that was built for another machine.
#pragma once
#include "int8-inl.hpp"

namespace sparsam::SPARSAM_TARGET {
namespace {

constexpr std::size_t kMaxInt8Lanes = 32;

void add_pair(const Int8View& w, std::size_t pair, const std::uint8_t* x, std::uint32_t* sums) {
  const std::size_t slots = 4 * w.lanes, starts = int8_pair_starts(w.window);
  const std::uint8_t* const code = w.codes + int8_pair_bytes(w.lanes, w.window) * pair;
  for (std::size_t step = 0; step < starts; ++step) {
    const std::uint8_t* const from = x + w.start[starts * pair + step];
    for (std::size_t i = 0; i < slots; ++i) {
      const auto value = static_cast<std::int8_t>(code[step * slots + i]);
      const std::uint8_t place = code[starts * slots + i];
      const std::size_t offset = w.window == 16 ? place >> 4 * step & 15 : place;
      SPARSAM_CHECK(value == 0 ||
                    (from - x) + static_cast<std::ptrdiff_t>(offset) < static_cast<std::ptrdiff_t>(w.cols));
      sums[i / 4] += static_cast<std::uint32_t>(value * from[offset]);
    }
  }
}

void multiply(const Int8View& w, std::size_t begin, std::size_t end, const std::uint8_t* x,
              std::size_t x_stride, const float* x_scale, std::size_t batch, const Epilogue& epilogue,
              const Output& y) {
  SPARSAM_CHECK(w.lanes <= kMaxInt8Lanes && w.lanes % Floats::kLanes == 0);
  for (std::size_t group = begin; group < end; ++group)
    for (std::size_t t = 0; t < batch; ++t) {
      std::uint32_t sums[kMaxInt8Lanes];
      float floats[kMaxInt8Lanes];
      __builtin_memcpy(sums, w.first + group * w.lanes, w.lanes * sizeof *sums);
      for (std::size_t pair = w.begin[group]; pair < w.begin[group + 1]; ++pair)
        add_pair(w, pair, x + t * x_stride, sums);
      for (std::size_t i = 0; i < w.lanes; ++i)
        floats[i] = static_cast<float>(static_cast<std::int32_t>(sums[i]));
      const Output to = row_of(y, t);
      const Int8Rows rows{w.rows, w.row, w.scale, epilogue, to};
      for (std::size_t i = 0; i < w.lanes; i += Floats::kLanes)
        rows.finish(group * w.lanes + i, floats + i, w.lanes, x_scale + t, 1);
    }
}

}  // namespace
}  // namespace sparsam::SPARSAM_TARGET
