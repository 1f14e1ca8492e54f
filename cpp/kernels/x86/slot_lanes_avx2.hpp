// The lanes of a group in slots, over 256-bit registers; slot_lanes_any-inl.hpp describes the layout of
// steps. Include after floats_avx2.hpp.
#pragma once
#include <immintrin.h>

#include "matmul.hpp"

namespace sparsam::avx2 {
namespace {

template <std::size_t kRows>
struct SlotLanes;

template <>
struct SlotLanes<8> {
  using Reg = __m256;

  static Reg zero() { return _mm256_setzero_ps(); }
  static Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static void store(float* p, Reg r) { _mm256_storeu_ps(p, r); }

  struct Constants {};
  struct Step {
    std::uint32_t used;
    __m256i offsets, signs;  // vpermps reads three bits of an offset, vblendvps the highest of a sign

    Step(const Constants&, const SlotView& w, std::size_t step) {
      const std::uint32_t word = static_cast<const std::uint32_t*>(w.words)[step];
      used = word >> 24;
      const __m256i all = _mm256_set1_epi32(static_cast<int>(word));
      offsets = _mm256_srlv_epi32(all, _mm256_setr_epi32(0, 3, 6, 9, 12, 15, 18, 21));
      signs = _mm256_sllv_epi32(all, _mm256_setr_epi32(7, 6, 5, 4, 3, 2, 1, 0));
    }
    std::size_t count() const { return static_cast<std::size_t>(__builtin_popcount(used)); }
    template <class Value>
    Reg weights(const Value* p) const {
      return _mm256_permutevar8x32_ps(Floats::load_values(p), expand_order(used));
    }
    template <class Value>
    static Reg all_weights(const Value* p) {
      return Floats::load_values(p);
    }
    Reg fma_all(Reg w, const float* x, Reg sum) const {
      return _mm256_fmadd_ps(w, _mm256_permutevar8x32_ps(_mm256_loadu_ps(x), offsets), sum);
    }
    Reg fma(Reg w, const float* x, Reg sum) const {
      return _mm256_blendv_ps(sum, fma_all(w, x, sum), _mm256_castsi256_ps(signs));
    }
  };
};

// Two registers, of the even and of the odd slots.
template <>
struct SlotLanes<16> {
  struct Reg {
    __m256 half[2];
  };

  static Reg zero() { return {{_mm256_setzero_ps(), _mm256_setzero_ps()}}; }
  static Reg add(Reg a, Reg b) {
    return {{_mm256_add_ps(a.half[0], b.half[0]), _mm256_add_ps(a.half[1], b.half[1])}};
  }
  static void store(float* p, Reg r) {
    const __m256 low = _mm256_unpacklo_ps(r.half[0], r.half[1]),
                 high = _mm256_unpackhi_ps(r.half[0], r.half[1]);
    _mm256_storeu_ps(p, _mm256_permute2f128_ps(low, high, 0x20));
    _mm256_storeu_ps(p + 8, _mm256_permute2f128_ps(low, high, 0x31));
  }

  struct Constants {};
  struct Step {
    std::uint32_t used;
    __m256i offsets[2], signs[2];

    Step(const Constants&, const SlotView& w, std::size_t step) : used(w.used[step]) {
      const std::uint64_t word = static_cast<const std::uint64_t*>(w.words)[step];
      const __m256i places = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
      const __m256i bits = _mm256_set1_epi32(static_cast<int>(used));
      const __m256i even = _mm256_setr_epi32(31, 29, 27, 25, 23, 21, 19, 17);
      for (int i = 0; i < 2; ++i) {
        offsets[i] = _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(word >> (32 * i))), places);
        signs[i] = _mm256_sllv_epi32(bits, i == 0 ? even : _mm256_sub_epi32(even, _mm256_set1_epi32(1)));
      }
    }
    std::size_t count() const { return static_cast<std::size_t>(__builtin_popcount(used)); }
    template <class Value>
    Reg weights(const Value* p) const {
      const std::uint32_t low = used & 0xff;
      const __m256 a = _mm256_permutevar8x32_ps(Floats::load_values(p), expand_order(low));
      const __m256 b =
          _mm256_permutevar8x32_ps(Floats::load_values(p + __builtin_popcount(low)), expand_order(used >> 8));
      return split(a, b);
    }
    template <class Value>
    static Reg all_weights(const Value* p) {
      return split(Floats::load_values(p), Floats::load_values(p + 8));
    }
    static Reg split(__m256 a, __m256 b) {
      const __m256 c = _mm256_permute2f128_ps(a, b, 0x20), d = _mm256_permute2f128_ps(a, b, 0x31);
      return {{_mm256_shuffle_ps(c, d, 0x88), _mm256_shuffle_ps(c, d, 0xdd)}};
    }
    Reg fma(Reg w, const float* x, Reg sum) const {
      const __m256 first = _mm256_loadu_ps(x), second = _mm256_loadu_ps(x + 8);
      for (int i = 0; i < 2; ++i) {
        const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(offsets[i], 28));
        const __m256 columns = _mm256_blendv_ps(_mm256_permutevar8x32_ps(first, offsets[i]),
                                                _mm256_permutevar8x32_ps(second, offsets[i]), upper);
        sum.half[i] = _mm256_blendv_ps(sum.half[i], _mm256_fmadd_ps(w.half[i], columns, sum.half[i]),
                                       _mm256_castsi256_ps(signs[i]));
      }
      return sum;
    }
  };
};

}  // namespace
}  // namespace sparsam::avx2
