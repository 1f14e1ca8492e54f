// Stores of results, over Floats: as float32, or rounded to bfloat16.
#pragma once
#include "matmul.hpp"

#define SPARSAM_INLINE inline __attribute__((always_inline))

namespace sparsam::SPARSAM_TARGET {
namespace {

constexpr std::size_t kLanes = Floats::kLanes;
static_assert(kLanes <= kMaxLanes && 64 % kLanes == 0);

// To the nearest bfloat16, ties to even; a NaN stays one.
SPARSAM_INLINE void narrow(const float* from, std::size_t n, Bfloat* to) {
  for (std::size_t i = 0; i < n; ++i) {
    std::uint32_t bits;
    __builtin_memcpy(&bits, from + i, sizeof bits);
    const std::uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);
    const std::uint32_t quiet = bits | 0x400000;
    to[i].bits = static_cast<std::uint16_t>(((bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded) >> 16);
  }
}

// The first n lanes to y.
SPARSAM_INLINE void store_y(float* to, Floats::Reg r, std::size_t n) {
  if (n == kLanes)
    Floats::store(to, r);
  else
    Floats::store_partial(to, r, n);
}
SPARSAM_INLINE void store_y(Bfloat* to, Floats::Reg r, std::size_t n) {
  float lanes[kLanes];
  Bfloat narrowed[kLanes];
  Floats::store(lanes, r);
  narrow(lanes, kLanes, narrowed);
  if (n == kLanes)
    __builtin_memcpy(to, narrowed, sizeof narrowed);
  else
    __builtin_memcpy(to, narrowed, n * sizeof(Bfloat));
}

}  // namespace
}  // namespace sparsam::SPARSAM_TARGET
