// Nibbles for AVX-512 with VNNI, VBMI and VBMI2: 16 rows.
#pragma once
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace sparsam::SPARSAM_TARGET {
namespace {

// vpermb looks at six bits of an index, of which a table that stands four times leaves four: what is above a
// nibble need not be cleared.
struct Nibbles {
  static constexpr std::size_t kLanes = 16;
  static constexpr std::size_t kMaxRows = 8;  // rows of x for whose sums there are registers
  using Sums = __m512i;
  using Levels = __m512i;

  static __m512i four_times(const void* p) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(p)));
  }
  static Levels load_levels(const std::int8_t* p) { return four_times(p); }
  static Sums zero() { return _mm512_setzero_si512(); }
  static __m512 to_floats(Sums s, Sums) { return _mm512_cvtepi32_ps(s); }

  struct Step {
    __m512i value, offset;
    Step(const std::uint8_t* code, Levels levels, bool second) {
      const __m512i codes = _mm512_loadu_si512(code), offsets = _mm512_loadu_si512(code + 64);
      value = _mm512_permutexvar_epi8(second ? _mm512_srli_epi16(codes, 4) : codes, levels);
      offset = second ? _mm512_srli_epi16(offsets, 4) : offsets;
    }
  };

  static Sums add_zero(Sums none, const Step&) { return none; }  // x is unsigned, as the form has it
  static Sums add(Sums sum, const Step& step, const std::uint8_t* x) {
    return Bytes::dot(sum, _mm512_permutexvar_epi8(step.offset, four_times(x)), step.value);
  }

  // Of the bitmask: levels of the low or the high halves of the next bytes, where bits are set, 0 elsewhere.
  static __m512i expand(const std::uint8_t* code, Levels levels, std::uint64_t word, bool high) {
    const __m512i codes = _mm512_loadu_si512(code);
    return _mm512_maskz_expand_epi8(
        word, _mm512_permutexvar_epi8(high ? _mm512_srli_epi16(codes, 4) : codes, levels));
  }
  static __m512i broadcast(const std::uint8_t* x) {  // four bytes
    std::int32_t bytes;
    __builtin_memcpy(&bytes, x, sizeof bytes);
    return _mm512_set1_epi32(bytes);
  }
  static Sums dot(Sums sum, __m512i x, __m512i value) { return Bytes::dot(sum, x, value); }
};

}  // namespace
}  // namespace sparsam::SPARSAM_TARGET
