// Slots of int4 values for any number of lanes, and the bitmask, entry by entry: the oracle of the others,
// and what multiplies with a form that was built for another machine.
#pragma once
#include "int8_any-inl.hpp"

namespace sparsam::SPARSAM_TARGET {
namespace {

void add_pair(const Int4View& w, const std::uint8_t* code, const std::uint8_t* start, const std::uint8_t* x,
              std::uint32_t* sums) {
  const std::size_t slots = 4 * w.lanes;
  for (std::size_t step = 0; step < 2; ++step)
    for (std::size_t i = 0; i < slots; ++i) {
      const std::int32_t level = w.levels[code[i] >> 4 * step & 15];
      const std::int32_t byte = x[start[step] + (code[slots + i] >> 4 * step & 15)];
      sums[i / 4] += static_cast<std::uint32_t>(level * byte);
    }
}

void multiply_int4(const Int4View& w, std::size_t begin, std::size_t end, const std::uint8_t* x,
                   std::size_t x_stride, const float* x_scale, std::size_t batch, const Epilogue& epilogue,
                   const Output& y) {
  SPARSAM_CHECK(w.lanes <= kMaxInt8Lanes && w.lanes % Floats::kLanes == 0);
  for (std::size_t group = begin; group < end; ++group)
    for (std::size_t t = 0; t < batch; ++t) {
      float total[kMaxInt8Lanes] = {};
      for (std::size_t unit = 0; unit < w.units(); ++unit) {
        std::uint32_t sums[kMaxInt8Lanes] = {};
        const std::size_t first = w.first_pair(group, unit), last = w.first_pair(group, unit + 1);
        for (std::size_t pair = first; pair < last; ++pair)
          add_pair(w, w.codes + int4_pair_bytes(w.lanes) * pair, w.starts_of(first) + 2 * (pair - first),
                   x + t * x_stride + unit * w.width, sums);
        const std::uint16_t* const scale = w.scale + (group * w.units() + unit) * w.lanes;
        for (std::size_t i = 0; i < w.lanes; ++i)
          total[i] += static_cast<float>(static_cast<std::int32_t>(sums[i])) * to_float(Bfloat{scale[i]});
      }
      const std::size_t lane = group * w.lanes;
      for (std::size_t i = 0; i < w.lanes; ++i) total[i] -= w.zero[lane + i];
      for (std::size_t i = 0; i < w.lanes; i += Floats::kLanes)
        Int8Rows{w.rows, w.row, nullptr, epilogue, row_of(y, t)}.finish(lane + i, total + i, w.lanes,
                                                                        x_scale + t, 1);
    }
}

// What a step adds to the sums of one half of a group. Returns how many codes it has.
std::size_t add_word(std::uint64_t word, const std::uint8_t* code, int shift, const std::int8_t* levels,
                     const std::uint8_t* x, std::uint32_t* sums) {
  std::size_t n = 0;
  for (; word != 0; word &= word - 1, ++n) {
    const int bit = __builtin_ctzll(word);
    sums[bit / 4] += static_cast<std::uint32_t>(levels[code[n] >> shift & 15] * std::int32_t{x[bit % 4]});
  }
  return n;
}

void multiply_int4_bitmask(const Int4BitmaskView& w, std::size_t begin, std::size_t end,
                           const std::uint8_t* x, std::size_t x_stride, const float* x_scale,
                           std::size_t batch, const Epilogue& epilogue, const Output& y) {
  constexpr std::size_t kHalf = kInt4Rows / 2;
  const std::size_t steps = w.steps();
  for (std::size_t group = begin; group < end; ++group)
    for (std::size_t t = 0; t < batch; ++t) {
      float total[kInt4Rows] = {};
      const std::uint8_t *first = w.codes + w.begin[group], *second = first;
      const std::uint64_t* word = w.words + 2 * group * steps;
      for (std::size_t unit = 0, step = 0; unit < w.units(); ++unit) {
        std::uint32_t sums[kInt4Rows] = {};
        for (; step < steps && step * kInt4Step < (unit + 1) * w.width; ++step, word += 2) {
          const std::uint8_t* const from = x + t * x_stride + kInt4Step * step;
          SPARSAM_CHECK(first <= w.codes + w.begin[group + 1] && second <= w.codes + w.begin[group + 1]);
          first += add_word(word[0], first, 0, w.levels, from, sums);
          second += add_word(word[1], second, 4, w.levels, from, sums + kHalf);
        }
        const std::uint16_t* const scale = w.scale + (group * w.units() + unit) * kInt4Rows;
        for (std::size_t i = 0; i < kInt4Rows; ++i)
          total[i] += static_cast<float>(static_cast<std::int32_t>(sums[i])) * to_float(Bfloat{scale[i]});
      }
      const std::size_t lane = group * kInt4Rows;
      for (std::size_t i = 0; i < kInt4Rows; ++i) total[i] -= w.zero[lane + i];
      for (std::size_t i = 0; i < kInt4Rows; i += Floats::kLanes)
        Int8Rows{w.rows, nullptr, nullptr, epilogue, row_of(y, t)}.finish(lane + i, total + i, kInt4Rows,
                                                                          x_scale + t, 1);
    }
}

}  // namespace
}  // namespace sparsam::SPARSAM_TARGET
