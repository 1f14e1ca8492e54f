// Floats and Doubles over 256-bit registers.
#pragma once
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "quads_x86.hpp"
#include "step_counts.hpp"

namespace sparsam::avx2 {
namespace {

// order[bits] has a byte for each lane, the index of its packed value: the number of set bits below the lane.
struct ExpandTable {
  std::uint64_t order[256];
  constexpr ExpandTable() : order() {
    for (unsigned bits = 0; bits < 256; ++bits) {
      unsigned n = 0;
      for (unsigned lane = 0; lane < 8; ++lane) {
        order[bits] |= std::uint64_t{n} << (8 * lane);
        n += bits >> lane & 1;
      }
      // A lane after the last value may ask for value 8; it is masked, and 8 wraps to 0.
    }
  }
};
constexpr ExpandTable kExpand;
inline __m256i expand_order(std::uint32_t bits) {
  return _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(kExpand.order[bits])));
}
alignas(32) constexpr std::int32_t kFirstLanes[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};

struct Floats {
  static constexpr std::size_t kLanes = 8;
  static constexpr bool kOneRegister = true;  // for a Reg
  static constexpr bool kEightSums = true;    // stay in registers
  static constexpr bool kFetches = true;      // values of the bitmask come later than they are needed
  using Counts = StepCounts<kLanes>;
  using Reg = __m256;

  static __m256i first_lanes(std::size_t n) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kFirstLanes + 8 - n));
  }
  static Reg set1(float x) { return _mm256_set1_ps(x); }
  static Reg zero() { return _mm256_setzero_ps(); }
  static Reg load(const float* p) { return _mm256_loadu_ps(p); }
  static Reg load_partial(const float* p, std::size_t n) { return _mm256_maskload_ps(p, first_lanes(n)); }
  static void store(float* p, Reg r) { _mm256_storeu_ps(p, r); }
  static void store_partial(float* p, Reg r, std::size_t n) { _mm256_maskstore_ps(p, first_lanes(n), r); }
  static Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static Reg sub(Reg a, Reg b) { return _mm256_sub_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
  static Reg div(Reg a, Reg b) { return _mm256_div_ps(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  static Reg max(Reg a, Reg b) { return _mm256_max_ps(a, b); }
  static Reg min(Reg a, Reg b) { return _mm256_min_ps(a, b); }
  static Reg abs(Reg a) { return _mm256_andnot_ps(set1(-0.0f), a); }
  static Reg copysign(Reg a, Reg b) { return _mm256_or_ps(a, _mm256_and_ps(set1(-0.0f), b)); }  // a >= 0
  static Reg round(Reg a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static Reg scale(Reg a, Reg n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
  }
  // table[i], i being the lowest four bits of each lane.
  static Reg lookup(const float (&table)[16], Reg bits) {
    const __m256i i = _mm256_castps_si256(bits);
    const Reg low = _mm256_permutevar8x32_ps(load(table), i),
              high = _mm256_permutevar8x32_ps(load(table + 8), i);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));
  }
  static float sum(Reg r) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(r), _mm256_extractf128_ps(r, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
  }
  // The largest lane; of NaN and a number, either.
  static float largest(Reg r) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(r), _mm256_extractf128_ps(r, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
  }
  // Keeps the compiler from loading a value again that is used several times.
  static void keep_in_register(Reg& r) { asm("" : "+x"(r)); }
  static void transpose(Reg (&r)[kLanes]) {
    Reg t[8], u[8];
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
      u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
      u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
      r[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
      r[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
    }
  }
  // One broadcast load and four shuffles: loads limit the speed of the product.
  template <class Value>
  static void broadcast4(const Value* p, Reg (&w)[4]) {
    const __m128 four = load4(p);
    Reg all = _mm256_set_m128(four, four);
    keep_in_register(all);
    w[0] = _mm256_permute_ps(all, 0x00);
    w[1] = _mm256_permute_ps(all, 0x55);
    w[2] = _mm256_permute_ps(all, 0xaa);
    w[3] = _mm256_permute_ps(all, 0xff);
  }
  static Reg load_values(const float* p) { return _mm256_loadu_ps(p); }
  static Reg load_values(const Bfloat* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  static Reg load_values(const Half* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  template <class Value>
  static PackedStep<Value> expanded(const Value* p, std::uint32_t bits) {
    return {p, bits};
  }
  template <class Value>
  static Reg fma_expanded(PackedStep<Value> step, Reg x, Reg sum) {
    const Value* p = step.values;
    const std::uint32_t bits = step.bits;
    const __m256i lane_bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane_bit);
    const Reg lanes = _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lane_bit));
    const Reg w = _mm256_permutevar8x32_ps(load_values(p), expand_order(bits));
    return _mm256_fmadd_ps(_mm256_and_ps(w, lanes), _mm256_and_ps(x, lanes), sum);
  }
};

struct Doubles {
  static constexpr std::size_t kLanes = 4;
  static constexpr std::size_t kSums = 8;  // registers for sums, in Floats as well: half of them
  using Reg = __m256d;

  static Reg set1(double x) { return _mm256_set1_pd(x); }
  static Reg zero() { return _mm256_setzero_pd(); }
  static Reg load(const double* p) { return _mm256_loadu_pd(p); }
  static void store(double* p, Reg r) { _mm256_storeu_pd(p, r); }
  static Reg sub(Reg a, Reg b) { return _mm256_sub_pd(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm256_mul_pd(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_pd(a, b, c); }
  static double sum(Reg r) {
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(r), _mm256_extractf128_pd(r, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
  }
};

}  // namespace
}  // namespace sparsam::avx2
