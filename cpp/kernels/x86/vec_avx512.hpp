// Vec over 512-bit registers, with nothing newer than Skylake-X's instructions.
#pragma once
#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace sparsam::avx512 {
namespace {

template <class Bits>
struct Vec {
  static constexpr std::size_t kLanes = 64 / sizeof(Bits);
  using Reg = __m512i;

  static Reg load(const Bits* p) { return _mm512_loadu_si512(p); }
  static void store(Bits* p, Reg r) { _mm512_storeu_si512(p, r); }
  static Reg set1(Bits b) {
    if constexpr (sizeof(Bits) == 2)
      return _mm512_set1_epi16(static_cast<short>(b));
    else if constexpr (sizeof(Bits) == 4)
      return _mm512_set1_epi32(static_cast<int>(b));
    else
      return _mm512_set1_epi64(static_cast<long long>(b));
  }
  static Reg key(Reg r) {
    return _mm512_and_si512(r, set1(static_cast<Bits>(static_cast<Bits>(~Bits{0}) >> 1)));
  }
  static Reg add(Reg a, Reg b) {
    if constexpr (sizeof(Bits) == 2)
      return _mm512_add_epi16(a, b);
    else if constexpr (sizeof(Bits) == 4)
      return _mm512_add_epi32(a, b);
    else
      return _mm512_add_epi64(a, b);
  }
  static Reg max(Reg a, Reg b) {
    if constexpr (sizeof(Bits) == 2)
      return _mm512_max_epu16(a, b);
    else if constexpr (sizeof(Bits) == 4)
      return _mm512_max_epu32(a, b);
    else
      return _mm512_max_epu64(a, b);
  }
  // Comparisons give Lanes; bits() has lane i in bit i. tally() counts set lanes per lane, total() adds them
  // up.
  using Lanes = std::conditional_t<sizeof(Bits) == 2, __mmask32,
                                   std::conditional_t<sizeof(Bits) == 4, __mmask16, __mmask8>>;
  static Lanes less(Reg a, Reg b) {
    if constexpr (sizeof(Bits) == 2)
      return _mm512_cmplt_epu16_mask(a, b);
    else if constexpr (sizeof(Bits) == 4)
      return _mm512_cmplt_epu32_mask(a, b);
    else
      return _mm512_cmplt_epu64_mask(a, b);
  }
  static std::uint64_t bits(Lanes lanes) { return lanes; }
  static Reg tally(Reg counts, Lanes lanes) {
    const Reg minus_one = _mm512_set1_epi32(-1);
    if constexpr (sizeof(Bits) == 2)
      return _mm512_mask_sub_epi16(counts, lanes, counts, minus_one);
    else if constexpr (sizeof(Bits) == 4)
      return _mm512_mask_sub_epi32(counts, lanes, counts, minus_one);
    else
      return _mm512_mask_sub_epi64(counts, lanes, counts, minus_one);
  }
  static Reg keep(Reg r, std::uint64_t bits) {
    if constexpr (sizeof(Bits) == 2)
      return _mm512_maskz_mov_epi16(static_cast<__mmask32>(bits), r);
    else if constexpr (sizeof(Bits) == 4)
      return _mm512_maskz_mov_epi32(static_cast<__mmask16>(bits), r);
    else
      return _mm512_maskz_mov_epi64(static_cast<__mmask8>(bits), r);
  }
};

}  // namespace
}  // namespace sparsam::avx512
