// The lanes of a group in slots, over 512-bit registers, and over 256-bit ones for groups of 8;
// slot_lanes_any-inl.hpp describes the layout of steps. Include after floats_avx512.hpp.
#pragma once
#include <immintrin.h>

#include "matmul.hpp"

namespace sparsam::avx512 {
namespace {

template <std::size_t kRows>
struct SlotLanes;

template <>
struct SlotLanes<16> {
  using Reg = __m512;

  static Reg zero() { return _mm512_setzero_ps(); }
  static Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static void store(float* p, Reg r) { _mm512_storeu_ps(p, r); }

  struct Constants {};
  struct Step {
    std::uint32_t used;
    __m512i offsets;  // vpermps reads four bits
    __mmask16 lanes;

    Step(const Constants&, const SlotView& w, std::size_t step)
        : used(w.used[step]), lanes(static_cast<__mmask16>(used)) {
      asm("" : "+Yk"(lanes));  // one mask register for all uses
      const std::uint64_t word = static_cast<const std::uint64_t*>(w.words)[step];
      const __m512i places = _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
      offsets = _mm512_srlv_epi32(_mm512_set1_epi64(static_cast<long long>(word)), places);
    }
    std::size_t count() const { return static_cast<std::size_t>(__builtin_popcount(used)); }
    // Merged into a register that was just zeroed: see Floats::fma_expanded.
    template <class Value>
    Reg weights(const Value* p) const {
      Reg w = _mm512_setzero_ps();
      Floats::keep_in_register(w);
      return _mm512_mask_expand_ps(w, lanes, Floats::load_values(p));
    }
    template <class Value>
    static Reg all_weights(const Value* p) {
      return Floats::load_values(p);
    }
    Reg fma_all(Reg w, const float* x, Reg sum) const {
      return _mm512_fmadd_ps(w, _mm512_permutexvar_ps(offsets, _mm512_loadu_ps(x)), sum);
    }
    Reg fma(Reg w, const float* x, Reg sum) const {
      return _mm512_mask3_fmadd_ps(w, _mm512_permutexvar_ps(offsets, _mm512_loadu_ps(x)), sum, lanes);
    }
  };
};

template <>
struct SlotLanes<8> {
  using Reg = __m256;

  static Reg zero() { return _mm256_setzero_ps(); }
  static Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static void store(float* p, Reg r) { _mm256_storeu_ps(p, r); }

  static Reg load(const float* p) { return _mm256_loadu_ps(p); }
  template <class Half16>
  static Reg load(const Half16* p) {
    return _mm256_set_m128(load4(p + 4), load4(p));
  }

  struct Constants {};
  struct Step {
    std::uint32_t used;
    __m256i offsets;  // vpermps reads three bits
    __mmask8 lanes;

    Step(const Constants&, const SlotView& w, std::size_t step) {
      const std::uint32_t word = static_cast<const std::uint32_t*>(w.words)[step];
      used = word >> 24;
      lanes = static_cast<__mmask8>(used);
      asm("" : "+Yk"(lanes));
      offsets = _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(word)),
                                  _mm256_setr_epi32(0, 3, 6, 9, 12, 15, 18, 21));
    }
    std::size_t count() const { return static_cast<std::size_t>(__builtin_popcount(used)); }
    template <class Value>
    Reg weights(const Value* p) const {
      Reg w = _mm256_setzero_ps();
      asm("" : "+v"(w));
      return _mm256_mask_expand_ps(w, lanes, load(p));
    }
    template <class Value>
    static Reg all_weights(const Value* p) {
      return load(p);
    }
    Reg fma(Reg w, const float* x, Reg sum) const {
      return _mm256_mask3_fmadd_ps(w, _mm256_permutevar8x32_ps(_mm256_loadu_ps(x), offsets), sum, lanes);
    }
  };
};

}  // namespace
}  // namespace sparsam::avx512
