// The bitmask of int4 values for Nibbles that expand codes under a word: both halves of a group side by side,
// so that a byte of codes is read once for each of its halves, and a row of x once for both.
#pragma once
#include "int8-inl.hpp"

namespace sparsam::SPARSAM_TARGET {
namespace {

static_assert(kInt4Rows == 2 * Nibbles::kLanes && Nibbles::kLanes == Floats::kLanes);

template <std::size_t kBatch>
void multiply_int4_words(const Int4BitmaskView& w, std::size_t begin, std::size_t end, const std::uint8_t* x,
                         std::size_t x_stride, const float* x_scale, const Epilogue& epilogue,
                         const Output& y) {
  constexpr std::size_t kAhead = 2048, kStepsOfLine = 4;  // a line of words is so many steps
  const Int8Rows rows{w.rows, nullptr, nullptr, epilogue, y};
  const Nibbles::Levels levels = Nibbles::load_levels(w.levels);
  const std::size_t steps = w.steps(), steps_of_unit = w.width / kInt4Step;
  const std::uint64_t* word = w.words + 2 * begin * steps;
  const std::uint16_t* scale = w.scale + begin * w.units() * kInt4Rows;
  for (std::size_t group = begin; group < end; ++group) {
    float total[kBatch * kInt4Rows] = {};
    const std::uint8_t *first = w.codes + w.begin[group], *second = first;
    for (std::size_t step = 0; step < steps; scale += kInt4Rows) {
      const std::size_t last = step + steps_of_unit < steps ? step + steps_of_unit : steps;
      Nibbles::Sums sum[kBatch], other[kBatch];
#pragma GCC unroll 8
      for (std::size_t t = 0; t < kBatch; ++t) sum[t] = other[t] = Nibbles::zero();
      for (; step < last; ++step, word += 2) {
        SPARSAM_CHECK(first <= w.codes + w.begin[group + 1] && second <= w.codes + w.begin[group + 1]);
        __builtin_prefetch(first + kAhead);
        if (step % kStepsOfLine == 0) __builtin_prefetch(reinterpret_cast<const char*>(word) + kAhead);
        const auto values = Nibbles::expand(first, levels, word[0], false);
        const auto others = Nibbles::expand(second, levels, word[1], true);
        first += __builtin_popcountll(word[0]);
        second += __builtin_popcountll(word[1]);
#pragma GCC unroll 8
        for (std::size_t t = 0; t < kBatch; ++t) {
          const auto four = Nibbles::broadcast(x + t * x_stride + kInt4Step * step);
          sum[t] = Nibbles::dot(sum[t], four, values);
          other[t] = Nibbles::dot(other[t], four, others);
        }
      }
      const auto* const scales = reinterpret_cast<const Bfloat*>(scale);
      const Floats::Reg low = Floats::load_values(scales), high = Floats::load_values(scales + kLanes);
#pragma GCC unroll 8
      for (std::size_t t = 0; t < kBatch; ++t) {
        float* const to = total + t * kInt4Rows;
        const Floats::Reg a = Floats::mul(Nibbles::to_floats(sum[t], Nibbles::zero()), low);
        const Floats::Reg b = Floats::mul(Nibbles::to_floats(other[t], Nibbles::zero()), high);
        Floats::store(to, Floats::add(Floats::load(to), a));
        Floats::store(to + kLanes, Floats::add(Floats::load(to + kLanes), b));
      }
    }
    for (std::size_t lane = 0; lane < kInt4Rows; lane += kLanes) {
      const Floats::Reg zero = Floats::load(w.zero + group * kInt4Rows + lane);
      for (std::size_t t = 0; t < kBatch; ++t) {
        float* const to = total + t * kInt4Rows + lane;
        Floats::store(to, Floats::sub(Floats::load(to), zero));
      }
      rows.finish(group * kInt4Rows + lane, total + lane, kInt4Rows, x_scale, kBatch);
    }
  }
}

void multiply_int4_bitmask(const Int4BitmaskView& w, std::size_t begin, std::size_t end,
                           const std::uint8_t* x, std::size_t x_stride, const float* x_scale,
                           std::size_t batch, const Epilogue& epilogue, const Output& y) {
  with_batch(batch,
             [&](auto n) { multiply_int4_words<n()>(w, begin, end, x, x_stride, x_scale, epilogue, y); });
}

}  // namespace
}  // namespace sparsam::SPARSAM_TARGET
