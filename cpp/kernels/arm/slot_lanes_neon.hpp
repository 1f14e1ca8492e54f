// The lanes of a group of 8 in slots, over two 128-bit registers; slot_lanes_any-inl.hpp describes the layout
// of steps. Include after floats_neon.hpp.
#pragma once
#include "slot_lanes_any-inl.hpp"

namespace sparsam::neon {
namespace {

template <std::size_t kRows>
struct SlotLanes : AnySlotLanes<kRows> {};

template <>
struct SlotLanes<8> {
  using Reg = Floats::Reg;

  static Reg zero() { return Floats::zero(); }
  static Reg add(const Reg& a, const Reg& b) { return Floats::add(a, b); }
  static void store(float* p, const Reg& r) { Floats::store(p, r); }

  struct Step {
    std::uint32_t used;
    uint8x16_t bytes[2];  // of the columns, in a window of 32 bytes
    uint32x4_t lanes[2];

    Step(const SlotView& w, std::size_t step) {
      constexpr std::int32_t kShift[2][4] = {{0, -3, -6, -9}, {-12, -15, -18, -21}};
      constexpr std::uint32_t kUsed[2][4] = {{1u << 24, 1u << 25, 1u << 26, 1u << 27},
                                             {1u << 28, 1u << 29, 1u << 30, 1u << 31}};
      const std::uint32_t word = static_cast<const std::uint32_t*>(w.words)[step];
      used = word >> 24;
      for (std::size_t i = 0; i < 2; ++i) {
        const uint32x4_t column =
            vandq_u32(vshlq_u32(vdupq_n_u32(word), vld1q_s32(kShift[i])), vdupq_n_u32(7));
        bytes[i] = vreinterpretq_u8_u32(vmlaq_u32(vdupq_n_u32(0x03020100), column, vdupq_n_u32(0x04040404)));
        lanes[i] = Floats::lanes_of(word, kUsed[i]);
      }
    }
    std::size_t count() const { return static_cast<std::size_t>(__builtin_popcount(used)); }
    template <class Value>
    Reg weights(const Value* p) const {
      return Floats::expand(p, used);
    }
    template <class Value>
    static Reg all_weights(const Value* p) {
      return Floats::load_values(p);
    }
    Reg fma_all(const Reg& w, const float* x, const Reg& sum) const {
      const uint8x16x2_t window = {
          {vreinterpretq_u8_f32(vld1q_f32(x)), vreinterpretq_u8_f32(vld1q_f32(x + 4))}};
      return Floats::map([&](std::size_t i) {
        const float32x4_t columns = vreinterpretq_f32_u8(vqtbl2q_u8(window, bytes[i]));
        return vfmaq_f32(sum.part[i], w.part[i], columns);
      });
    }
    Reg fma(const Reg& w, const float* x, const Reg& sum) const {
      const Reg all = fma_all(w, x, sum);
      return Floats::map([&](std::size_t i) { return vbslq_f32(lanes[i], all.part[i], sum.part[i]); });
    }
  };
};

}  // namespace
}  // namespace sparsam::neon
