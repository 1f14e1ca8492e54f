// Vec over 256-bit registers. Keys have a clear top bit, so AVX2's signed comparisons order them.
#pragma once
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace sparsam::avx2 {
namespace {

template <class Bits>
struct Vec {
  static constexpr std::size_t kLanes = 32 / sizeof(Bits);
  using Reg = __m256i;

  static Reg load(const Bits* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void store(Bits* p, Reg r) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), r); }
  static Reg set1(Bits b) {
    if constexpr (sizeof(Bits) == 2)
      return _mm256_set1_epi16(static_cast<short>(b));
    else if constexpr (sizeof(Bits) == 4)
      return _mm256_set1_epi32(static_cast<int>(b));
    else
      return _mm256_set1_epi64x(static_cast<long long>(b));
  }
  static Reg key(Reg r) {
    return _mm256_and_si256(r, set1(static_cast<Bits>(static_cast<Bits>(~Bits{0}) >> 1)));
  }
  static Reg greater(Reg a, Reg b) {
    if constexpr (sizeof(Bits) == 2)
      return _mm256_cmpgt_epi16(a, b);
    else if constexpr (sizeof(Bits) == 4)
      return _mm256_cmpgt_epi32(a, b);
    else
      return _mm256_cmpgt_epi64(a, b);
  }
  static Reg add(Reg a, Reg b) {
    if constexpr (sizeof(Bits) == 2)
      return _mm256_add_epi16(a, b);
    else if constexpr (sizeof(Bits) == 4)
      return _mm256_add_epi32(a, b);
    else
      return _mm256_add_epi64(a, b);
  }
  static Reg max(Reg a, Reg b) {
    if constexpr (sizeof(Bits) == 2)
      return _mm256_max_epu16(a, b);
    else if constexpr (sizeof(Bits) == 4)
      return _mm256_max_epu32(a, b);
    else
      return _mm256_blendv_epi8(b, a, greater(a, b));
  }
  using Lanes = __m256i;
  static Lanes less(Reg a, Reg b) { return greater(b, a); }
  static std::uint64_t bits(Lanes lanes) {
    if constexpr (sizeof(Bits) == 2) {
      const __m128i bytes =
          _mm_packs_epi16(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));
      return static_cast<std::uint32_t>(_mm_movemask_epi8(bytes));
    } else if constexpr (sizeof(Bits) == 4) {
      return static_cast<std::uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(lanes)));
    } else {
      return static_cast<std::uint32_t>(_mm256_movemask_pd(_mm256_castsi256_pd(lanes)));
    }
  }
  static Reg tally(Reg counts, Lanes lanes) {
    if constexpr (sizeof(Bits) == 2)
      return _mm256_sub_epi16(counts, lanes);
    else if constexpr (sizeof(Bits) == 4)
      return _mm256_sub_epi32(counts, lanes);
    else
      return _mm256_sub_epi64(counts, lanes);
  }
  static Reg keep(Reg r, std::uint64_t bits) {
    Reg lane_bit;
    if constexpr (sizeof(Bits) == 2)
      lane_bit =
          _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, -32768);
    else if constexpr (sizeof(Bits) == 4)
      lane_bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    else
      lane_bit = _mm256_setr_epi64x(1, 2, 4, 8);
    const Reg set = _mm256_and_si256(set1(static_cast<Bits>(bits)), lane_bit);
    Reg lanes;
    if constexpr (sizeof(Bits) == 2)
      lanes = _mm256_cmpeq_epi16(set, lane_bit);
    else if constexpr (sizeof(Bits) == 4)
      lanes = _mm256_cmpeq_epi32(set, lane_bit);
    else
      lanes = _mm256_cmpeq_epi64(set, lane_bit);
    return _mm256_and_si256(r, lanes);
  }
};

}  // namespace
}  // namespace sparsam::avx2
