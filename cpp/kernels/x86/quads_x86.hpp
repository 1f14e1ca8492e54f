// Four values as floats: what floats_avx2.hpp and floats_avx512.hpp have in common.
#pragma once
#include <immintrin.h>

#include "half.hpp"

namespace sparsam::SPARSAM_TARGET {
namespace {

inline __m128 load4(const float* p) { return _mm_loadu_ps(p); }
inline __m128 load4(const Bfloat* p) {
  return _mm_castsi128_ps(
      _mm_slli_epi32(_mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))), 16));
}
inline __m128 load4(const Half* p) {
  return _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
}  // namespace
}  // namespace sparsam::SPARSAM_TARGET
