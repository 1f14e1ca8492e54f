// Bytes for NEON: 8 rows in two registers, windows of 16 columns, as AVX2 has them. x is taken as signed, its
// zero being 0 then, so that sums begin at 0 and not at what the form says for unsigned ones.
#pragma once
#include <arm_neon.h>

#include <cstddef>
#include <cstdint>

namespace sparsam::SPARSAM_TARGET {
namespace {

struct Bytes {
  static constexpr std::size_t kLanes = 8, kWindow = 16;
#ifdef __ARM_FEATURE_DOTPROD
  static constexpr std::size_t kApart = 2;
#else
  static constexpr std::size_t kApart = 0;
#endif
  static constexpr bool kNarrow = false;
  struct Sums {
    int32x4_t part[2];
  };

  using Window = int8x16_t;

  static Sums zero() { return {{vdupq_n_s32(0), vdupq_n_s32(0)}}; }
  static Sums plus(const Sums& a, const Sums& b) {
    return {{vaddq_s32(a.part[0], b.part[0]), vaddq_s32(a.part[1], b.part[1])}};
  }
  static Sums load_sums(const std::int32_t*) { return zero(); }
  static Floats::Reg to_floats(const Sums& s) {
    return {{vcvtq_f32_s32(s.part[0]), vcvtq_f32_s32(s.part[1])}};
  }

  struct Pair {
    int8x16_t value0[2], value1[2];
    uint8x16_t offset0[2], offset1[2];
    explicit Pair(const std::uint8_t* code) {
      for (std::size_t i = 0; i < 2; ++i) {
        value0[i] = vreinterpretq_s8_u8(vld1q_u8(code + 16 * i));
        value1[i] = vreinterpretq_s8_u8(vld1q_u8(code + 32 + 16 * i));
        const uint8x16_t both = vld1q_u8(code + 64 + 16 * i);
        offset0[i] = vandq_u8(both, vdupq_n_u8(15));
        offset1[i] = vshrq_n_u8(both, 4);
      }
    }
  };

  // Without sdot: |127 * 64| four times fits int16, so neighbours are added up there first.
  static int32x4_t dot(int32x4_t sum, int8x16_t value, int8x16_t x) {
#ifdef __ARM_FEATURE_DOTPROD
    return vdotq_s32(sum, value, x);
#else
    const int16x8_t low = vmull_s8(vget_low_s8(value), vget_low_s8(x));
    return vpadalq_s16(sum, vpaddq_s16(low, vmull_high_s8(value, x)));
#endif
  }
  static Window window(const std::uint8_t* x) {
    return veorq_s8(vreinterpretq_s8_u8(vld1q_u8(x)), vdupq_n_s8(-128));
  }
  static Sums add_first(Sums sum, const Pair& p, Window x) {
    for (std::size_t i = 0; i < 2; ++i)
      sum.part[i] = dot(sum.part[i], p.value0[i], vqtbl1q_s8(x, p.offset0[i]));
    return sum;
  }
  static Sums add_second(Sums sum, const Pair& p, Window x) {
    for (std::size_t i = 0; i < 2; ++i)
      sum.part[i] = dot(sum.part[i], p.value1[i], vqtbl1q_s8(x, p.offset1[i]));
    return sum;
  }
  // add_first and add_second at once.
  static Sums add_both(Sums sum, const Pair& p, Window x0, Window x1) {
#ifdef __ARM_FEATURE_DOTPROD
    return add_second(add_first(sum, p, x0), p, x1);
#else
    for (std::size_t i = 0; i < 2; ++i) {
      const int8x16_t first = vqtbl1q_s8(x0, p.offset0[i]), second = vqtbl1q_s8(x1, p.offset1[i]);
      const int16x8_t low = vmlal_s8(vmull_s8(vget_low_s8(p.value0[i]), vget_low_s8(first)),
                                     vget_low_s8(p.value1[i]), vget_low_s8(second));
      const int16x8_t high = vmlal_high_s8(vmull_high_s8(p.value0[i], first), p.value1[i], second);
      sum.part[i] = vpadalq_s16(sum.part[i], vpaddq_s16(low, high));
    }
    return sum;
#endif
  }
};

}  // namespace
}  // namespace sparsam::SPARSAM_TARGET
