// Bytes for AVX-512 with VNNI and VBMI: 16 rows, windows of 64 columns.
#pragma once
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace sparsam::SPARSAM_TARGET {
namespace {

struct Bytes {
  static constexpr std::size_t kLanes = 16, kWindow = 64;
  using Sums = __m512i;

  static Sums load_sums(const std::int32_t* p) { return _mm512_loadu_si512(p); }
  static __m512 to_floats(Sums s) { return _mm512_cvtepi32_ps(s); }

  struct Pair {
    __m512i value0, value1, offset0, offset1;
    explicit Pair(const std::uint8_t* code)
        : value0(_mm512_loadu_si512(code)),
          value1(_mm512_loadu_si512(code + 64)),
          offset0(_mm512_loadu_si512(code + 128)),
          offset1(_mm512_loadu_si512(code + 192)) {}
  };

  // Both steps read one window: a load that crosses cache lines, as most do, takes as long as both products.
  static Sums add(Sums sum, const Pair& p, const std::uint8_t* x, const std::uint8_t*) {
    const __m512i window = _mm512_loadu_si512(x);
    sum = _mm512_dpbusd_epi32(sum, _mm512_permutexvar_epi8(p.offset0, window), p.value0);
    return _mm512_dpbusd_epi32(sum, _mm512_permutexvar_epi8(p.offset1, window), p.value1);
  }
};

}  // namespace
}  // namespace sparsam::SPARSAM_TARGET
