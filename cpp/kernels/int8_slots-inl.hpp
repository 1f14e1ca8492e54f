// Slots of int8 values for the geometry of Bytes: output rows in the lanes, x fetched by a shuffle of bytes
// within the window. The sums of up to kInt8Batch rows of x stay in registers while the weights stream by.
#pragma once
#include "int8-inl.hpp"

namespace sparsam::SPARSAM_TARGET {
namespace {

// Written flat: sums that a lambda or a struct captured would live in memory, and every step would wait for
// its store (tests/project/test_assembly.py looks for that).
template <std::size_t kBatch, class Own = Bytes>  // a name for what not all Bytes have
void multiply_groups(const Int8View& w, std::size_t begin, std::size_t end, const std::uint8_t* x,
                     std::size_t x_stride, const float* x_scale, const Epilogue& epilogue, const Output& y) {
  constexpr std::size_t kBytes = int8_pair_bytes(Bytes::kLanes, Bytes::kWindow);
  constexpr std::size_t kStarts = int8_pair_starts(Bytes::kWindow), kAhead = 2048;
  // Second steps are of other rows, or of the same. With few sums, each product waits for the one before it:
  // those of second steps are summed apart then.
  constexpr bool kHalves = kStarts == 1, kApart = kHalves || kBatch <= Bytes::kApart;
  constexpr std::size_t kSeconds = kApart ? kBatch : 1;
  static_assert(Bytes::kLanes == (kHalves ? 2 : 1) * kLanes);
  const Int8Rows rows{w.rows, w.row, w.scale, epilogue, y};
  for (std::size_t group = begin; group < end; ++group) {
    const std::size_t lane = group * Bytes::kLanes;
    Bytes::Sums sum[kBatch], second[kSeconds];
#pragma GCC unroll 8
    for (std::size_t t = 0; t < kBatch; ++t) sum[t] = Bytes::load_sums(w.first + lane);
#pragma GCC unroll 8
    for (std::size_t t = 0; t < kSeconds; ++t)
      second[t] = kHalves ? Bytes::load_sums(w.first + lane + kLanes) : Bytes::zero();
    const std::uint16_t* start = w.start + kStarts * w.begin[group];
    const std::uint8_t* code = w.codes + kBytes * w.begin[group];
    const std::uint8_t* const last = w.codes + kBytes * w.begin[group + 1];
    if constexpr (Bytes::kNarrow) {
      const std::uint8_t* const wide = w.codes + kBytes * w.wide[group];
      for (; code != wide; code += kBytes, start += kStarts) {
        if constexpr (kBatch <= 2)
          for (std::size_t line = 0; line < kBytes; line += 64) __builtin_prefetch(code + kAhead + line);
        SPARSAM_CHECK(start[0] < w.cols && start[1] < w.cols);
        const Bytes::Pair pair(code);
        const std::uint8_t *x0 = x + start[0], *x1 = x + start[1];
#pragma GCC unroll 8
        for (std::size_t t = 0; t < kBatch; ++t)
          sum[t] = Own::add_narrow(sum[t], pair, Bytes::window(x0 + t * x_stride),
                                   Bytes::window(x1 + t * x_stride));
      }
    }
    for (; code != last; code += kBytes, start += kStarts) {
      if constexpr (kBatch <= 2)
        for (std::size_t line = 0; line < kBytes; line += 64) __builtin_prefetch(code + kAhead + line);
      SPARSAM_CHECK(start[0] < w.cols && start[kStarts - 1] < w.cols);
      const Bytes::Pair pair(code);
      const std::uint8_t *x0 = x + start[0], *x1 = x + start[kStarts - 1];
#pragma GCC unroll 8
      for (std::size_t t = 0; t < kBatch; ++t) {
        const Bytes::Window from = Bytes::window(x0 + t * x_stride);
        const Bytes::Window next = kStarts == 1 ? from : Bytes::window(x1 + t * x_stride);
        if constexpr (kApart) {
          sum[t] = Bytes::add_first(sum[t], pair, from);
          second[t] = Bytes::add_second(second[t], pair, next);
        } else {
          sum[t] = Own::add_both(sum[t], pair, from, next);
        }
      }
    }
    if constexpr (kApart && !kHalves) {
#pragma GCC unroll 8
      for (std::size_t t = 0; t < kBatch; ++t) sum[t] = Bytes::plus(sum[t], second[t]);
    }
    float sums[kBatch * Bytes::kLanes];
#pragma GCC unroll 8
    for (std::size_t t = 0; t < kBatch; ++t) {
      Floats::store(sums + t * Bytes::kLanes, Bytes::to_floats(sum[t]));
      if constexpr (kHalves) Floats::store(sums + t * Bytes::kLanes + kLanes, Bytes::to_floats(second[t]));
    }
    for (std::size_t part = 0; part < Bytes::kLanes; part += kLanes)
      rows.finish(lane + part, sums + part, Bytes::kLanes, x_scale, kBatch);
  }
}

void multiply(const Int8View& w, std::size_t begin, std::size_t end, const std::uint8_t* x,
              std::size_t x_stride, const float* x_scale, std::size_t batch, const Epilogue& epilogue,
              const Output& y) {
  SPARSAM_CHECK(w.lanes == Bytes::kLanes && w.window == Bytes::kWindow);
  with_batch(batch, [&](auto n) { multiply_groups<n()>(w, begin, end, x, x_stride, x_scale, epilogue, y); });
}

}  // namespace
}  // namespace sparsam::SPARSAM_TARGET
