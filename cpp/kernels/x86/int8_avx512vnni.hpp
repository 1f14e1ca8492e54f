// Bytes for AVX-512 with VNNI and VBMI: 32 rows in two registers, windows of 64 columns.
#pragma once
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace sparsam::SPARSAM_TARGET {
namespace {

struct Bytes {
  static constexpr std::size_t kLanes = 32, kWindow = 64, kApart = 0;
  static constexpr bool kNarrow = false;
  using Sums = __m512i;
  using Window = __m512i;

  static Sums load_sums(const std::int32_t* p) { return _mm512_loadu_si512(p); }
  static Sums zero() { return _mm512_setzero_si512(); }
  static Sums plus(Sums a, Sums b) { return _mm512_add_epi32(a, b); }
  static __m512 to_floats(Sums s) { return _mm512_cvtepi32_ps(s); }

  // Held in a register: GCC would load it again for each row of x, and loads are what there is least of. Most
  // of windows cross cache lines.
  static __m512i load(const std::uint8_t* p) {
    __m512i loaded = _mm512_loadu_si512(p);
    __asm__("" : "+v"(loaded));
    return loaded;
  }

  struct Pair {
    __m512i value0, value1, offset0, offset1;
    explicit Pair(const std::uint8_t* code)
        : value0(load(code)), value1(load(code + 64)), offset0(load(code + 128)), offset1(load(code + 192)) {}
  };

  static Window window(const std::uint8_t* x) { return load(x); }
  // Not by the intrinsic: GCC 12 copies each sum before and after it.
  static Sums dot(Sums sum, __m512i x, __m512i value) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(value));
    return sum;
  }
  static Sums add_first(Sums sum, const Pair& p, Window x) {
    return dot(sum, _mm512_permutexvar_epi8(p.offset0, x), p.value0);
  }
  static Sums add_second(Sums sum, const Pair& p, Window x) {
    return dot(sum, _mm512_permutexvar_epi8(p.offset1, x), p.value1);
  }
};

}  // namespace
}  // namespace sparsam::SPARSAM_TARGET
