// Nibbles for machines whose Bytes have windows of 16 columns and 256-bit registers: codes become values, and
// the rest is that of int8.
#pragma once
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace sparsam::SPARSAM_TARGET {
namespace {

struct Nibbles {
  static constexpr std::size_t kLanes = Bytes::kLanes;
  static constexpr std::size_t kMaxRows = 5;  // rows of x for whose sums there are registers
  using Sums = Bytes::Sums;
  using Levels = __m256i;

  static Levels load_levels(const std::int8_t* p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Sums zero() { return _mm256_setzero_si256(); }
  static __m256 to_floats(Sums s, Sums) { return Bytes::to_floats(s); }

  struct Step {
    __m256i value, offset;
    Step(const std::uint8_t* code, Levels levels, bool second) {
      const __m256i low = _mm256_set1_epi8(15);
      __m256i codes = Bytes::load(code), offsets = Bytes::load(code + 32);
      if (second) {
        codes = _mm256_srli_epi16(codes, 4);
        offsets = _mm256_srli_epi16(offsets, 4);
      }
      value = _mm256_shuffle_epi8(levels, _mm256_and_si256(codes, low));
      offset = _mm256_and_si256(offsets, low);
    }
  };

  static Sums add_zero(Sums none, const Step&) { return none; }  // x is unsigned, as the form has it
  static Sums add(Sums sum, const Step& step, const std::uint8_t* x) {
    return _mm256_add_epi32(sum, Bytes::dot(Bytes::window(x), step.offset, step.value));
  }
};

}  // namespace
}  // namespace sparsam::SPARSAM_TARGET
