// The lanes of a group in slots, one by one: for any machine, and for groups for which a machine has no
// shuffle. Include after a floats_*.hpp.
#pragma once
#include "matmul.hpp"

namespace sparsam::SPARSAM_TARGET {
namespace {

template <std::size_t kRows>
struct AnySlotLanes {
  struct Reg {
    float lane[kRows];
  };

  static Reg zero() { return {}; }
  static Reg add(Reg a, const Reg& b) {
    for (std::size_t i = 0; i < kRows; ++i) a.lane[i] += b.lane[i];
    return a;
  }
  static void store(float* p, const Reg& r) { __builtin_memcpy(p, &r, sizeof r); }

  // Of 8 slots, slot i has its column in bits [3 i, 3 i + 3) of a word of 32 bits, and is used where bit 24 +
  // i is set. Of 16 slots, slot i has it in bits [4 (i / 2), 4 (i / 2) + 4) of the lower (even i) or upper
  // (odd i) half of a word of 64, and a bit of another word.
  struct Constants {};
  struct Step {
    std::uint8_t offset[kRows];
    std::uint32_t used;

    Step(const Constants&, const SlotView& w, std::size_t step) {
      if constexpr (kRows == 8) {
        const std::uint32_t word = static_cast<const std::uint32_t*>(w.words)[step];
        used = word >> 24;
        for (std::size_t i = 0; i < 8; ++i) offset[i] = static_cast<std::uint8_t>(word >> (3 * i) & 7);
      } else {
        const std::uint64_t word = static_cast<const std::uint64_t*>(w.words)[step];
        used = w.used[step];
        for (std::size_t i = 0; i < 16; ++i)
          offset[i] = static_cast<std::uint8_t>(word >> (i % 2 * 32 + i / 2 * 4) & 15);
      }
    }
    std::size_t count() const { return static_cast<std::size_t>(__builtin_popcount(used)); }
    // The next values, in the lanes of the slots that are used.
    template <class Value>
    Reg weights(const Value* p) const {
      Reg r{};
      for (std::size_t i = 0; i < kRows; ++i)
        if ((used >> i & 1) != 0) r.lane[i] = to_float(*p++);
      return r;
    }
    // The next values, of all slots.
    template <class Value>
    static Reg all_weights(const Value* p) {
      Reg r;
      for (std::size_t i = 0; i < kRows; ++i) r.lane[i] = to_float(p[i]);
      return r;
    }
    // sum + w * the column of x, in all lanes.
    Reg fma_all(const Reg& w, const float* x, Reg sum) const {
      for (std::size_t i = 0; i < kRows; ++i) sum.lane[i] += w.lane[i] * x[offset[i]];
      return sum;
    }
    // The same in the lanes of the slots that are used.
    Reg fma(const Reg& w, const float* x, Reg sum) const {
      for (std::size_t i = 0; i < kRows; ++i)
        if ((used >> i & 1) != 0) sum.lane[i] += w.lane[i] * x[offset[i]];
      return sum;
    }
  };
};

}  // namespace
}  // namespace sparsam::SPARSAM_TARGET
