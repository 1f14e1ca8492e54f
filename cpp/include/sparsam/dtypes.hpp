// Floating-point types as bit patterns. The magnitude order of IEEE numbers is the integer order of their
// bits without the sign, so every selection kernel works on unsigned keys: u16 (float16, bfloat16), u32, u64.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace sparsam {

// i8 and i4 are only for packed values: no kernel selects among integers. The levels of i4 values take a
// byte each but in slots and files.
enum class DType : std::uint8_t { f16, bf16, f32, f64, i8, i4 };

constexpr std::size_t item_size(DType t) {
  return t == DType::f64 ? 8 : t == DType::f32 ? 4 : t == DType::i8 || t == DType::i4 ? 1 : 2;
}

// The key of infinity; every key above it is a NaN.
constexpr std::uint64_t infinity_key(DType t) {
  switch (t) {
    case DType::f16:
      return 0x7c00;
    case DType::bf16:
      return 0x7f80;
    case DType::f32:
      return 0x7f800000;
    default:
      return 0x7ff0000000000000;
  }
}

template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// Exact: every float16 is a float32. NaN stays NaN.
inline float half_to_float(std::uint16_t h) {
  const std::uint32_t sign = static_cast<std::uint32_t>(h & 0x8000) << 16;
  const std::uint32_t rest = h & 0x7fffu;
  if (rest >= 0x7c00) return bit_cast<float>(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
  if (rest < 0x0400) {  // zero and denormals: rest * 2^-24
    const float magnitude = static_cast<float>(rest) * 5.9604644775390625e-8f;
    return sign != 0 ? -magnitude : magnitude;
  }
  return bit_cast<float>(sign | ((rest << 13) + 0x38000000u));
}

inline float bfloat_to_float(std::uint16_t h) { return bit_cast<float>(static_cast<std::uint32_t>(h) << 16); }

// The number whose bits are stored at p; exact.
inline double load_double(const void* p, DType t) {
  std::uint16_t half;
  switch (t) {
    case DType::f64: {
      double d;
      std::memcpy(&d, p, sizeof d);
      return d;
    }
    case DType::f32: {
      float f;
      std::memcpy(&f, p, sizeof f);
      return static_cast<double>(f);
    }
    case DType::f16:
      std::memcpy(&half, p, sizeof half);
      return static_cast<double>(half_to_float(half));
    default:
      std::memcpy(&half, p, sizeof half);
      return static_cast<double>(bfloat_to_float(half));
  }
}

inline double key_to_double(std::uint64_t key, DType t) { return load_double(&key, t); }

// The largest key of type t whose magnitude is at most `value` (>= 0, not NaN).
std::uint64_t key_at_most(double value, DType t);

}  // namespace sparsam
