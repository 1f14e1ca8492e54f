// 16-bit values as the kernels hold them. Include inside no namespace, before Floats.
#pragma once
#include <cstdint>

namespace sparsam::SPARSAM_TARGET {
namespace {

struct Bfloat {
  std::uint16_t bits;
};
struct Half {
  std::uint16_t bits;
};

inline float to_float(float x) { return x; }

inline float to_float(Bfloat x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
  float f;
  __builtin_memcpy(&f, &bits, sizeof f);
  return f;
}

// Shifts exponent and fraction into place; the product restores the exponent's bias, denormals included.
inline float to_float(Half x) {
  const std::uint32_t rest = static_cast<std::uint32_t>(x.bits & 0x7fff) << 13;
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000) << 16;
  float f;
  __builtin_memcpy(&f, &rest, sizeof f);
  f *= 0x1p112f;
  std::uint32_t bits;
  __builtin_memcpy(&bits, &f, sizeof bits);
  if (rest >= 0x0f800000) bits = rest | 0x7f800000;  // infinity and NaN
  bits |= sign;
  __builtin_memcpy(&f, &bits, sizeof f);
  return f;
}

}  // namespace
}  // namespace sparsam::SPARSAM_TARGET
