// What Bytes of 256-bit registers have in common, with AVX-VNNI or without: 8 rows, windows of 16 columns.
#pragma once
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace sparsam::SPARSAM_TARGET {
namespace {

struct Bytes256 {
  static constexpr std::size_t kLanes = 8, kWindow = 16;
  using Sums = __m256i;
  using Window = __m256i;  // 16 columns, twice

  static __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static Sums load_sums(const std::int32_t* p) { return load(p); }
  static Sums zero() { return _mm256_setzero_si256(); }
  static Sums plus(Sums a, Sums b) { return _mm256_add_epi32(a, b); }
  static __m256 to_floats(Sums s) { return _mm256_cvtepi32_ps(s); }

  struct Pair {
    __m256i value0, value1, offset0, offset1;
    explicit Pair(const std::uint8_t* code) {
      const __m256i low = _mm256_set1_epi8(15), both = load(code + 64);
      value0 = load(code);
      value1 = load(code + 32);
      offset0 = _mm256_and_si256(both, low);
      offset1 = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
    }
  };

  static Window window(const std::uint8_t* x) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  }
};

}  // namespace
}  // namespace sparsam::SPARSAM_TARGET
