// Nibbles for NEON: codes become values, and the rest is that of int8. Include after int8_neon.hpp.
#pragma once
#include <arm_neon.h>

#include <cstddef>
#include <cstdint>

namespace sparsam::SPARSAM_TARGET {
namespace {

struct Nibbles {
  static constexpr std::size_t kLanes = Bytes::kLanes;
  static constexpr std::size_t kMaxRows = 8;  // rows of x for whose sums there are registers
  using Sums = Bytes::Sums;
  using Levels = int8x16_t;

  static Levels load_levels(const std::int8_t* p) { return vld1q_s8(p); }
  static Sums zero() { return Bytes::zero(); }

  struct Step {
    int8x16_t value[2];
    uint8x16_t offset[2];
    Step(const std::uint8_t* code, Levels levels, bool second) {
      for (std::size_t i = 0; i < 2; ++i) {
        const uint8x16_t codes = vld1q_u8(code + 16 * i), offsets = vld1q_u8(code + 32 + 16 * i);
        value[i] = vqtbl1q_s8(levels, second ? vshrq_n_u8(codes, 4) : vandq_u8(codes, vdupq_n_u8(15)));
        offset[i] = second ? vshrq_n_u8(offsets, 4) : vandq_u8(offsets, vdupq_n_u8(15));
      }
    }
  };

  static Sums add(Sums sum, const Step& step, const std::uint8_t* x) {
    const Bytes::Window window = Bytes::window(x);
    for (std::size_t i = 0; i < 2; ++i)
      sum.part[i] = Bytes::dot(sum.part[i], step.value[i], vqtbl1q_s8(window, step.offset[i]));
    return sum;
  }
  // x is signed here. Sums of its unsigned bytes, which the form is for, have 128 times the values more.
  static Sums add_zero(Sums sum, const Step& step) {
    for (std::size_t i = 0; i < 2; ++i)
      sum.part[i] = Bytes::dot(sum.part[i], step.value[i], vdupq_n_s8(-128));
    return sum;
  }
  static Floats::Reg to_floats(const Sums& sum, const Sums& zeros) {
    return {{vcvtq_f32_s32(vsubq_s32(sum.part[0], zeros.part[0])),
             vcvtq_f32_s32(vsubq_s32(sum.part[1], zeros.part[1]))}};
  }
};

}  // namespace
}  // namespace sparsam::SPARSAM_TARGET
