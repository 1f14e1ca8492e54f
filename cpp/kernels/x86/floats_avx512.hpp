// Floats and Doubles over 512-bit registers, with nothing newer than Skylake-X's instructions.
#pragma once
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "quads_x86.hpp"
#include "step_counts.hpp"

namespace sparsam::avx512 {
namespace {

struct Floats {
  static constexpr std::size_t kLanes = 16;
  static constexpr bool kOneRegister = true;  // for a Reg
  static constexpr bool kEightSums = true;    // stay in registers
  static constexpr bool kFetches = true;      // values of the bitmask come later than they are needed
  using Counts = StepCounts<kLanes>;
  using Reg = __m512;

  static __mmask16 first_lanes(std::size_t n) { return static_cast<__mmask16>((1u << n) - 1); }
  static Reg set1(float x) { return _mm512_set1_ps(x); }
  static Reg zero() { return _mm512_setzero_ps(); }
  static Reg load(const float* p) { return _mm512_loadu_ps(p); }
  static Reg load_partial(const float* p, std::size_t n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
  static void store(float* p, Reg r) { _mm512_storeu_ps(p, r); }
  static void store_partial(float* p, Reg r, std::size_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), r); }
  static Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static Reg sub(Reg a, Reg b) { return _mm512_sub_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  static Reg div(Reg a, Reg b) { return _mm512_div_ps(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  static Reg max(Reg a, Reg b) { return _mm512_max_ps(a, b); }
  static Reg min(Reg a, Reg b) { return _mm512_min_ps(a, b); }
  static Reg abs(Reg a) { return _mm512_andnot_ps(set1(-0.0f), a); }
  static Reg copysign(Reg a, Reg b) { return _mm512_or_ps(a, _mm512_and_ps(set1(-0.0f), b)); }  // a >= 0
  static Reg round(Reg a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static Reg scale(Reg a, Reg n) { return _mm512_scalef_ps(a, n); }
  // table[i], i being the lowest four bits of each lane.
  static Reg lookup(const float (&table)[16], Reg bits) {
    return _mm512_permutexvar_ps(_mm512_castps_si512(bits), load(table));
  }
  static float sum(Reg r) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(r), _mm512_extractf32x8_ps(r, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
  }
  // The largest lane; of NaN and a number, either.
  static float largest(Reg r) {
    const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(r), _mm512_extractf32x8_ps(r, 1));
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
  }
  // Keeps the compiler from loading a value again that is used several times.
  static void keep_in_register(Reg& r) { asm("" : "+v"(r)); }
  static void transpose(Reg (&r)[kLanes]) {
    Reg t[16], u[16];
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
      u[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
      u[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
      u[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      u[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
      const Reg a = _mm512_shuffle_f32x4(u[i], u[i + 4], 0x88),
                b = _mm512_shuffle_f32x4(u[i], u[i + 4], 0xdd);
      const Reg c = _mm512_shuffle_f32x4(u[i + 8], u[i + 12], 0x88),
                d = _mm512_shuffle_f32x4(u[i + 8], u[i + 12], 0xdd);
      r[i] = _mm512_shuffle_f32x4(a, c, 0x88);
      r[i + 8] = _mm512_shuffle_f32x4(a, c, 0xdd);
      r[i + 4] = _mm512_shuffle_f32x4(b, d, 0x88);
      r[i + 12] = _mm512_shuffle_f32x4(b, d, 0xdd);
    }
  }
  // One broadcast load and four shuffles: loads limit the speed of the product.
  template <class Value>
  static void broadcast4(const Value* p, Reg (&w)[4]) {
    Reg all = _mm512_broadcast_f32x4(load4(p));
    keep_in_register(all);
    w[0] = _mm512_permute_ps(all, 0x00);
    w[1] = _mm512_permute_ps(all, 0x55);
    w[2] = _mm512_permute_ps(all, 0xaa);
    w[3] = _mm512_permute_ps(all, 0xff);
  }
  static Reg load_values(const float* p) { return _mm512_loadu_ps(p); }
  static Reg load_values(const Bfloat* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static Reg load_values(const Half* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  template <class Value>
  static PackedStep<Value> expanded(const Value* p, std::uint32_t bits) {
    return {p, bits};
  }
  // A zero-masked expand waits for the old value of its destination on Zen 4 and Zen 5; merging into a
  // register that was just zeroed does not. With the masked product, infinities in x do not meet pruned
  // weights.
  template <class Value>
  static Reg fma_expanded(PackedStep<Value> step, Reg x, Reg sum) {
    const Value* p = step.values;
    const std::uint32_t bits = step.bits;
    auto lanes = static_cast<__mmask16>(bits);
    asm("" : "+Yk"(lanes));  // one mask register for both uses
    Reg w = zero();
    keep_in_register(w);
    w = _mm512_mask_expand_ps(w, lanes, load_values(p));
    return _mm512_mask3_fmadd_ps(w, x, sum, lanes);
  }
};

struct Doubles {
  static constexpr std::size_t kLanes = 8;
  static constexpr std::size_t kSums = 16;  // registers for sums, in Floats as well: half of them
  using Reg = __m512d;

  static Reg set1(double x) { return _mm512_set1_pd(x); }
  static Reg zero() { return _mm512_setzero_pd(); }
  static Reg load(const double* p) { return _mm512_loadu_pd(p); }
  static void store(double* p, Reg r) { _mm512_storeu_pd(p, r); }
  static Reg sub(Reg a, Reg b) { return _mm512_sub_pd(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm512_mul_pd(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_pd(a, b, c); }
  static double sum(Reg r) {
    const __m256d four = _mm256_add_pd(_mm512_castpd512_pd256(r), _mm512_extractf64x4_pd(r, 1));
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
  }
};

}  // namespace
}  // namespace sparsam::avx512
