// Bytes for AVX2: products of bytes in two steps.
#pragma once
#include "int8_256.hpp"

namespace sparsam::SPARSAM_TARGET {
namespace {

struct Bytes : Bytes256 {
  static constexpr std::size_t kApart = 0;
  static constexpr bool kNarrow = true;

  // Products of neighbouring slots do not leave int16: the packer sees to that.
  static __m256i twos(Window window, __m256i offset, __m256i value) {
    return _mm256_maddubs_epi16(_mm256_shuffle_epi8(window, offset), value);
  }
  static __m256i widen(__m256i twos) { return _mm256_madd_epi16(twos, _mm256_set1_epi16(1)); }
  static __m256i dot(Window window, __m256i offset, __m256i value) {
    return widen(twos(window, offset, value));
  }
  static Sums add_first(Sums sum, const Pair& p, Window x) {
    return _mm256_add_epi32(sum, dot(x, p.offset0, p.value0));
  }
  static Sums add_second(Sums sum, const Pair& p, Window x) {
    return _mm256_add_epi32(sum, dot(x, p.offset1, p.value1));
  }
  static Sums add_both(Sums sum, const Pair& p, Window x0, Window x1) {
    return add_second(add_first(sum, p, x0), p, x1);
  }
  // Of narrow pairs, which are nearly all: one operation of eight less.
  static Sums add_narrow(Sums sum, const Pair& p, Window x, Window next) {
    const __m256i both = _mm256_add_epi16(twos(x, p.offset0, p.value0), twos(next, p.offset1, p.value1));
    return _mm256_add_epi32(sum, widen(both));
  }
};

}  // namespace
}  // namespace sparsam::SPARSAM_TARGET
