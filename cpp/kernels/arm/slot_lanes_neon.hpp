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

  // Kept in registers: GCC builds them again in each step.
  struct Constants {
    uint8x16_t bytes, each[2], in_order;
    int16x8_t shift;
    uint32x4_t used[2];

    __attribute__((always_inline)) Constants() {
      // Of each column, the two bytes that it lies in, and what moves it to 4 times its number there.
      constexpr std::uint8_t kBytes[16] = {0, 1, 0, 1, 0, 1, 1, 2, 1, 2, 1, 2, 2, 3, 2, 3};
      constexpr std::int16_t kShift[8] = {2, -1, -4, 1, -2, -5, 0, -3};
      constexpr std::uint8_t kEach[2][16] = {{0, 0, 0, 0, 2, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6},
                                             {8, 8, 8, 8, 10, 10, 10, 10, 12, 12, 12, 12, 14, 14, 14, 14}};
      constexpr std::uint32_t kUsed[2][4] = {{1u << 24, 1u << 25, 1u << 26, 1u << 27},
                                             {1u << 28, 1u << 29, 1u << 30, 1u << 31}};
      bytes = vld1q_u8(kBytes);
      shift = vld1q_s16(kShift);
      in_order = vreinterpretq_u8_u32(vdupq_n_u32(0x03020100));
      asm("" : "+w"(bytes), "+w"(shift), "+w"(in_order));
      for (std::size_t i = 0; i < 2; ++i) {
        each[i] = vld1q_u8(kEach[i]);
        used[i] = vld1q_u32(kUsed[i]);
        asm("" : "+w"(each[i]));
        asm("" : "+w"(used[i]));
      }
    }
  };

  struct Step {
    std::uint32_t word;
    uint8x16_t bytes[2];  // of the columns, in a window of 32 bytes
    uint8x16_t used[2];   // the same; of slots that are not used, bytes behind the window, which are 0

    // Inlined whatever GCC thinks of it: a call for each step takes most of the time of one row.
    __attribute__((always_inline)) Step(const Constants& c, const SlotView& w, std::size_t step)
        : word(static_cast<const std::uint32_t*>(w.words)[step]) {
      const uint32x4_t words = vdupq_n_u32(word);
      const uint16x8_t pairs = vreinterpretq_u16_u8(vqtbl1q_u8(vreinterpretq_u8_u32(words), c.bytes));
      const uint8x16_t columns = vreinterpretq_u8_u16(vandq_u16(vshlq_u16(pairs, c.shift), vdupq_n_u16(28)));
      for (std::size_t i = 0; i < 2; ++i) {
        bytes[i] = vorrq_u8(vqtbl1q_u8(columns, c.each[i]), c.in_order);
        used[i] = vornq_u8(bytes[i], vreinterpretq_u8_u32(vtstq_u32(words, c.used[i])));
      }
    }
    std::size_t count() const { return kExpand.count[word >> 24]; }
    template <class Value>
    __attribute__((always_inline)) Reg weights(const Value* p) const {
      return Floats::expand(p, word >> 24);
    }
    template <class Value>
    static Reg all_weights(const Value* p) {
      return Floats::load_values(p);
    }
    Reg fma_all(const Reg& w, const float* x, const Reg& sum) const { return product(w, x, bytes, sum); }
    Reg fma(const Reg& w, const float* x, const Reg& sum) const { return product(w, x, used, sum); }

   private:
    __attribute__((always_inline)) static Reg product(const Reg& w, const float* x, const uint8x16_t (&of)[2],
                                                      const Reg& sum) {
      const uint8x16x2_t window = vld1q_u8_x2(reinterpret_cast<const std::uint8_t*>(x));
      return Floats::map([&](std::size_t i) {
        return vfmaq_f32(sum.part[i], w.part[i], vreinterpretq_f32_u8(vqtbl2q_u8(window, of[i])));
      });
    }
  };
};

}  // namespace
}  // namespace sparsam::neon
