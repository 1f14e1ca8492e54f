// Bytes for AVX-VNNI: products of bytes in one instruction.
#pragma once
#include "int8_256.hpp"

namespace sparsam::SPARSAM_TARGET {
namespace {

struct Bytes : Bytes256 {
  static constexpr std::size_t kApart = 4;
  static constexpr bool kNarrow = false;

  // Not by the intrinsic: GCC 12 copies each sum before and after it, and has no registers left for that.
  static Sums dot(Sums sum, __m256i x, __m256i value) {
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(x), "x"(value));
    return sum;
  }
  static Sums add_first(Sums sum, const Pair& p, Window x) {
    return dot(sum, _mm256_shuffle_epi8(x, p.offset0), p.value0);
  }
  static Sums add_second(Sums sum, const Pair& p, Window x) {
    return dot(sum, _mm256_shuffle_epi8(x, p.offset1), p.value1);
  }
  static Sums add_both(Sums sum, const Pair& p, Window x0, Window x1) {
    return add_second(add_first(sum, p, x0), p, x1);
  }
};

}  // namespace
}  // namespace sparsam::SPARSAM_TARGET
