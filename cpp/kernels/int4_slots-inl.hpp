// Slots of int4 values for the lanes of Nibbles: as int8_slots-inl.hpp, but that the sums of a unit are
// scaled and added up in float32 when its columns end.
#pragma once
#include "int8-inl.hpp"

namespace sparsam::SPARSAM_TARGET {
namespace {

static_assert(Nibbles::kLanes == Floats::kLanes);

template <std::size_t kBatch>
void multiply_int4_groups(const Int4View& w, std::size_t begin, std::size_t end, const std::uint8_t* x,
                          std::size_t x_stride, const float* x_scale, const Epilogue& epilogue,
                          const Output& y) {
  constexpr std::size_t kBytes = int4_pair_bytes(Nibbles::kLanes), kAhead = 2048;
  const Int8Rows rows{w.rows, w.row, nullptr, epilogue, y};
  const Nibbles::Levels levels = Nibbles::load_levels(w.levels);
  const std::size_t units = w.units();
  for (std::size_t group = begin; group < end; ++group) {
    float total[kBatch * kLanes] = {};
    const std::uint16_t* scale = w.scale + group * units * kLanes;
    const std::uint8_t* code = w.codes + kBytes * w.first_pair(group, 0);
    for (std::size_t unit = 0; unit < units; ++unit, scale += kLanes) {
      const std::uint8_t* start = w.starts_of(w.first_pair(group, unit));
      const std::uint8_t* const last = w.codes + kBytes * w.first_pair(group, unit + 1);
      const std::uint8_t* const from = x + unit * w.width;
      Nibbles::Sums sum[kBatch], zeros = Nibbles::zero();
#pragma GCC unroll 8
      for (std::size_t t = 0; t < kBatch; ++t) sum[t] = Nibbles::zero();
      for (; code != last; code += kBytes, start += 2) {
        for (std::size_t line = 0; line < kBytes; line += 64) __builtin_prefetch(code + kAhead + line);
        SPARSAM_CHECK(unit * w.width + start[0] < w.cols && unit * w.width + start[1] < w.cols + kInt4Window);
        const Nibbles::Step first(code, levels, false);
        zeros = Nibbles::add_zero(zeros, first);
#pragma GCC unroll 8
        for (std::size_t t = 0; t < kBatch; ++t)
          sum[t] = Nibbles::add(sum[t], first, from + start[0] + t * x_stride);
        const Nibbles::Step second(code, levels, true);
        zeros = Nibbles::add_zero(zeros, second);
#pragma GCC unroll 8
        for (std::size_t t = 0; t < kBatch; ++t)
          sum[t] = Nibbles::add(sum[t], second, from + start[1] + t * x_stride);
      }
      const Floats::Reg scales = Floats::load_values(reinterpret_cast<const Bfloat*>(scale));
#pragma GCC unroll 8
      for (std::size_t t = 0; t < kBatch; ++t) {
        const Floats::Reg scaled = Floats::mul(Nibbles::to_floats(sum[t], zeros), scales);
        Floats::store(total + t * kLanes, Floats::add(Floats::load(total + t * kLanes), scaled));
      }
    }
    const Floats::Reg zero = Floats::load(w.zero + group * kLanes);
#pragma GCC unroll 8
    for (std::size_t t = 0; t < kBatch; ++t)
      Floats::store(total + t * kLanes, Floats::sub(Floats::load(total + t * kLanes), zero));
    rows.finish(group * kLanes, total, kLanes, x_scale, kBatch);
  }
}

void multiply_int4(const Int4View& w, std::size_t begin, std::size_t end, const std::uint8_t* x,
                   std::size_t x_stride, const float* x_scale, std::size_t batch, const Epilogue& epilogue,
                   const Output& y) {
  SPARSAM_CHECK(w.lanes == kLanes);
  const std::size_t passes = (batch + Nibbles::kMaxRows - 1) / Nibbles::kMaxRows;
  for (std::size_t group = begin; passes > 1 && group < end; ++group)
    for (std::size_t pass = 0; pass < passes; ++pass) {
      const std::size_t t = batch * pass / passes;
      multiply_int4(w, group, group + 1, x + t * x_stride, x_stride, x_scale + t,
                    batch * (pass + 1) / passes - t, epilogue, row_of(y, t));
    }
  if (passes > 1) return;
  with_batch(batch, [&](auto n) {
    if constexpr (n() <= Nibbles::kMaxRows)
      multiply_int4_groups<n()>(w, begin, end, x, x_stride, x_scale, epilogue, y);
  });
}

}  // namespace
}  // namespace sparsam::SPARSAM_TARGET
