// Floats and Doubles over 128-bit registers, of which AArch64 has 32: eight floats in two.
#pragma once
#include <arm_neon.h>

#include <cstddef>
#include <cstdint>

#include "half.hpp"

namespace sparsam::SPARSAM_TARGET {
namespace {

// Byte shuffles that move packed floats to their lanes: byte[bits] says which packed byte goes where; an
// index past the last gives 0. And how many bits there are, for which NEON takes four instructions.
struct ExpandTable {
  alignas(64) std::uint8_t byte[256][32];
  std::uint8_t count[256];
  constexpr ExpandTable() : byte(), count() {
    for (unsigned bits = 0; bits < 256; ++bits) {
      unsigned n = 0;
      for (unsigned lane = 0; lane < 8; ++lane) {
        const unsigned used = bits >> lane & 1;
        for (unsigned i = 0; i < 4; ++i)
          byte[bits][4 * lane + i] = static_cast<std::uint8_t>(used != 0 ? 4 * n + i : 255);
        n += used;
      }
      count[bits] = static_cast<std::uint8_t>(n);
    }
  }
};
constexpr ExpandTable kExpand;

struct Floats {
  static constexpr std::size_t kLanes = 8;
  static constexpr bool kOneRegister = false;  // for a Reg
  static constexpr bool kEightSums = true;     // stay in registers
  static constexpr bool kFetches = true;       // values of the bitmask come later than they are needed
  struct Reg {
    float32x4_t part[2];
  };

  // Where the values of a step begin, among those of a word of 64 columns: NEON counts the bits of all its
  // bytes at once.
  class Counts {
   public:
    explicit Counts(std::uint64_t word) {
      const uint8x8_t each = vcnt_u8(vcreate_u8(word));
      upto_ = vget_lane_u64(vreinterpret_u64_u8(each), 0) * 0x0101010101010101;
    }
    std::size_t before(std::size_t step) const { return step == 0 ? 0 : upto_ >> (8 * (step - 1)) & 255; }
    std::size_t all() const { return upto_ >> 56; }

   private:
    std::uint64_t upto_;  // byte i has those of the first i + 1
  };

  template <class F>
  static Reg map(F f) {
    return {{f(0), f(1)}};
  }
  static Reg set1(float x) { return {{vdupq_n_f32(x), vdupq_n_f32(x)}}; }
  static Reg zero() { return set1(0.0f); }
  static Reg load(const float* p) { return {{vld1q_f32(p), vld1q_f32(p + 4)}}; }
  static Reg load_partial(const float* p, std::size_t n) {
    if (n == kLanes) return load(p);
    float lanes[kLanes] = {};
    __builtin_memcpy(lanes, p, n * sizeof(float));
    return load(lanes);
  }
  static void store(float* p, const Reg& r) {
    vst1q_f32(p, r.part[0]);
    vst1q_f32(p + 4, r.part[1]);
  }
  static void store_partial(float* p, const Reg& r, std::size_t n) {
    __builtin_memcpy(p, &r, n * sizeof(float));
  }
  static Reg add(const Reg& a, const Reg& b) {
    return map([&](std::size_t i) { return vaddq_f32(a.part[i], b.part[i]); });
  }
  static Reg sub(const Reg& a, const Reg& b) {
    return map([&](std::size_t i) { return vsubq_f32(a.part[i], b.part[i]); });
  }
  static Reg mul(const Reg& a, const Reg& b) {
    return map([&](std::size_t i) { return vmulq_f32(a.part[i], b.part[i]); });
  }
  static Reg div(const Reg& a, const Reg& b) {
    return map([&](std::size_t i) { return vdivq_f32(a.part[i], b.part[i]); });
  }
  static Reg fma(const Reg& a, const Reg& b, const Reg& c) {
    return map([&](std::size_t i) { return vfmaq_f32(c.part[i], a.part[i], b.part[i]); });
  }
  // b if either is NaN, as on x86.
  static Reg max(const Reg& a, const Reg& b) {
    return map(
        [&](std::size_t i) { return vbslq_f32(vcgtq_f32(a.part[i], b.part[i]), a.part[i], b.part[i]); });
  }
  static Reg min(const Reg& a, const Reg& b) {
    return map(
        [&](std::size_t i) { return vbslq_f32(vcltq_f32(a.part[i], b.part[i]), a.part[i], b.part[i]); });
  }
  static Reg abs(const Reg& a) {
    return map([&](std::size_t i) { return vabsq_f32(a.part[i]); });
  }
  static Reg copysign(const Reg& a, const Reg& b) {
    return map([&](std::size_t i) { return vbslq_f32(vdupq_n_u32(0x80000000), b.part[i], a.part[i]); });
  }
  static Reg round(const Reg& a) {
    return map([&](std::size_t i) { return vrndnq_f32(a.part[i]); });
  }
  static Reg scale(const Reg& a, const Reg& n) {
    return map([&](std::size_t i) {
      const int32x4_t exponent = vaddq_s32(vcvtnq_s32_f32(n.part[i]), vdupq_n_s32(127));
      return vmulq_f32(a.part[i], vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23)));
    });
  }
  // table[i], i being the lowest four bits of each lane: bytes 4 i to 4 i + 3.
  static Reg lookup(const float (&table)[16], const Reg& bits) {
    const uint8x16x4_t bytes = vld1q_u8_x4(reinterpret_cast<const std::uint8_t*>(table));
    return map([&](std::size_t i) {
      const uint32x4_t index = vandq_u32(vreinterpretq_u32_f32(bits.part[i]), vdupq_n_u32(15));
      const uint32x4_t at = vaddq_u32(vmulq_n_u32(index, 0x04040404), vdupq_n_u32(0x03020100));
      return vreinterpretq_f32_u8(vqtbl4q_u8(bytes, vreinterpretq_u8_u32(at)));
    });
  }
  static float sum(const Reg& r) { return vaddvq_f32(vaddq_f32(r.part[0], r.part[1])); }
  // The largest lane; of NaN and a number, either.
  static float largest(const Reg& r) { return vmaxvq_f32(vmaxq_f32(r.part[0], r.part[1])); }
  // Keeps the compiler from loading a value again that is used several times.
  static void keep_in_register(Reg& r) { asm("" : "+w"(r.part[0]), "+w"(r.part[1])); }
  static void transpose4(float32x4_t& a, float32x4_t& b, float32x4_t& c, float32x4_t& d) {
    const float32x4x2_t even = vzipq_f32(a, c), odd = vzipq_f32(b, d);
    const float32x4x2_t low = vzipq_f32(even.val[0], odd.val[0]), high = vzipq_f32(even.val[1], odd.val[1]);
    a = low.val[0];
    b = low.val[1];
    c = high.val[0];
    d = high.val[1];
  }
  static void transpose(Reg (&r)[kLanes]) {
    for (std::size_t i = 0; i < 8; i += 4)
      for (std::size_t part = 0; part < 2; ++part)
        transpose4(r[i].part[part], r[i + 1].part[part], r[i + 2].part[part], r[i + 3].part[part]);
    for (std::size_t i = 0; i < 4; ++i) {
      const float32x4_t corner = r[i].part[1];
      r[i].part[1] = r[i + 4].part[0];
      r[i + 4].part[0] = corner;
    }
  }
  template <class Value>
  static void broadcast4(const Value* p, Reg (&w)[4]) {
    const float32x4_t all = load4(p);
    w[0] = twice(vdupq_laneq_f32(all, 0));
    w[1] = twice(vdupq_laneq_f32(all, 1));
    w[2] = twice(vdupq_laneq_f32(all, 2));
    w[3] = twice(vdupq_laneq_f32(all, 3));
  }
  static Reg twice(float32x4_t r) { return {{r, r}}; }
  static float32x4_t load4(const float* p) { return vld1q_f32(p); }
  static float32x4_t load4(const Bfloat* p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&p->bits), 16));
  }
  static float32x4_t load4(const Half* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits))); }
  static Reg load_values(const float* p) { return load(p); }
  static Reg load_values(const Bfloat* p) {
    const uint16x8_t all = vld1q_u16(&p->bits);
    return {{vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(all), 16)),
             vreinterpretq_f32_u32(vshll_high_n_u16(all, 16))}};
  }
  static Reg load_values(const Half* p) {
    const float16x8_t all = vreinterpretq_f16_u16(vld1q_u16(&p->bits));
    return {{vcvt_f32_f16(vget_low_f16(all)), vcvt_high_f32_f16(all)}};
  }
  // Eight packed values, as two registers that one shuffle reads. The load of both keeps GCC from copying
  // them.
  static uint8x16x2_t packed(const float* p) { return vld1q_u8_x2(reinterpret_cast<const std::uint8_t*>(p)); }
  template <class Value>
  __attribute__((always_inline)) static uint8x16x2_t packed(const Value* p) {
    const Reg all = load_values(p);
    return {{vreinterpretq_u8_f32(all.part[0]), vreinterpretq_u8_f32(all.part[1])}};
  }
  // The values at p, the first ones packed, in the lanes of `bits`; 0 in the others.
  template <class Value>
  __attribute__((always_inline)) static Reg expand(const Value* p, std::uint32_t bits) {
    const uint8x16x2_t all = packed(p);
    return map([&](std::size_t i) {
      return vreinterpretq_f32_u8(vqtbl2q_u8(all, vld1q_u8(kExpand.byte[bits] + 16 * i)));
    });
  }
  struct Expanded {
    Reg weights;
    uint32x4_t lanes[2];  // all ones where there is a weight
  };
  template <class Value>
  __attribute__((always_inline)) static Expanded expanded(const Value* p, std::uint32_t bits) {
    constexpr std::uint32_t kBits[2][4] = {{1, 2, 4, 8}, {16, 32, 64, 128}};
    const uint32x4_t all = vdupq_n_u32(bits);
    return {expand(p, bits), {vtstq_u32(all, vld1q_u32(kBits[0])), vtstq_u32(all, vld1q_u32(kBits[1]))}};
  }
  // sum + w * x in the lanes of the step.
  static Reg fma_expanded(const Expanded& w, const Reg& x, const Reg& sum) {
    return map([&](std::size_t i) {
      const uint32x4_t kept = vandq_u32(vreinterpretq_u32_f32(x.part[i]), w.lanes[i]);
      return vfmaq_f32(sum.part[i], w.weights.part[i], vreinterpretq_f32_u32(kept));
    });
  }
};

struct Doubles {
  static constexpr std::size_t kLanes = 2;
  static constexpr std::size_t kSums = 8;  // registers for sums, in Floats twice as many: half of them
  using Reg = float64x2_t;

  static Reg set1(double x) { return vdupq_n_f64(x); }
  static Reg zero() { return set1(0.0); }
  static Reg load(const double* p) { return vld1q_f64(p); }
  static void store(double* p, Reg r) { vst1q_f64(p, r); }
  static Reg sub(Reg a, Reg b) { return vsubq_f64(a, b); }
  static Reg mul(Reg a, Reg b) { return vmulq_f64(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return vfmaq_f64(c, a, b); }
  static double sum(Reg r) { return vaddvq_f64(r); }
};

}  // namespace
}  // namespace sparsam::SPARSAM_TARGET
