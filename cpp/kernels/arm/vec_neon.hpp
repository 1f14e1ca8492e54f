// Vec over four 128-bit registers: the results of comparing 64 bytes are turned into bits together, which is
// cheapest per byte.
#pragma once
#include <arm_neon.h>

#include <cstddef>
#include <cstdint>

namespace sparsam::SPARSAM_TARGET {
namespace {

// One register of lanes of a width; comparisons give all ones or 0.
struct Lanes16 {
  using Reg = uint16x8_t;
  static Reg load(const std::uint16_t* p) { return vld1q_u16(p); }
  static void store(std::uint16_t* p, Reg r) { vst1q_u16(p, r); }
  static Reg set1(std::uint16_t b) { return vdupq_n_u16(b); }
  static Reg max(Reg a, Reg b) { return vmaxq_u16(a, b); }
  static Reg less(Reg a, Reg b) { return vcltq_u16(a, b); }
  static Reg test(Reg a, Reg b) { return vtstq_u16(a, b); }
};
struct Lanes32 {
  using Reg = uint32x4_t;
  static Reg load(const std::uint32_t* p) { return vld1q_u32(p); }
  static void store(std::uint32_t* p, Reg r) { vst1q_u32(p, r); }
  static Reg set1(std::uint32_t b) { return vdupq_n_u32(b); }
  static Reg max(Reg a, Reg b) { return vmaxq_u32(a, b); }
  static Reg less(Reg a, Reg b) { return vcltq_u32(a, b); }
  static Reg test(Reg a, Reg b) { return vtstq_u32(a, b); }
};
struct Lanes64 {
  using Reg = uint64x2_t;
  static Reg load(const std::uint64_t* p) { return vld1q_u64(p); }
  static void store(std::uint64_t* p, Reg r) { vst1q_u64(p, r); }
  static Reg set1(std::uint64_t b) { return vdupq_n_u64(b); }
  static Reg max(Reg a, Reg b) { return vbslq_u64(vcgtq_u64(a, b), a, b); }
  static Reg less(Reg a, Reg b) { return vcltq_u64(a, b); }
  static Reg test(Reg a, Reg b) { return vtstq_u64(a, b); }
};

template <class Bits>
struct LanesOfWidth;
template <>
struct LanesOfWidth<std::uint16_t> {
  using type = Lanes16;
};
template <>
struct LanesOfWidth<std::uint32_t> {
  using type = Lanes32;
};
template <>
struct LanesOfWidth<std::uint64_t> {
  using type = Lanes64;
};

// A bit for each of 16 bytes that are all ones or 0, in two sums of eight.
inline uint8x16_t byte_bits(uint8x16_t lanes) {
  constexpr std::uint8_t kBits[16] = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
  return vandq_u8(lanes, vld1q_u8(kBits));
}

template <class Bits>
struct Vec {
  static constexpr std::size_t kLanes = 64 / sizeof(Bits), kEach = kLanes / 4;
  using One = typename LanesOfWidth<Bits>::type;
  struct Reg {
    typename One::Reg part[4];
  };

  template <class F>
  static Reg map(F f) {
    return {{f(0), f(1), f(2), f(3)}};
  }
  static Reg load(const Bits* p) {
    return map([&](std::size_t i) { return One::load(p + i * kEach); });
  }
  static void store(Bits* p, const Reg& r) {
    for (std::size_t i = 0; i < 4; ++i) One::store(p + i * kEach, r.part[i]);
  }
  static Reg set1(Bits b) {
    return map([&](std::size_t) { return One::set1(b); });
  }
  static Reg key(const Reg& r) {
    const auto mask = One::set1(static_cast<Bits>(static_cast<Bits>(~Bits{0}) >> 1));
    return map([&](std::size_t i) { return r.part[i] & mask; });
  }
  static Reg add(const Reg& a, const Reg& b) {
    return map([&](std::size_t i) { return a.part[i] + b.part[i]; });
  }
  static Reg max(const Reg& a, const Reg& b) {
    return map([&](std::size_t i) { return One::max(a.part[i], b.part[i]); });
  }
  using Lanes = Reg;  // all ones or 0 in each
  static Lanes less(const Reg& a, const Reg& b) {
    return map([&](std::size_t i) { return One::less(a.part[i], b.part[i]); });
  }
  static Reg tally(const Reg& counts, const Lanes& lanes) {
    return map([&](std::size_t i) { return counts.part[i] - lanes.part[i]; });
  }
  // Lanes are narrowed to bytes, each of which keeps a different bit; three rounds of pairwise sums combine
  // eight.
  static std::uint64_t bits(const Lanes& lanes) {
    const auto& p = lanes.part;
    if constexpr (sizeof(Bits) == 2) {
      const uint8x16_t low = vuzp1q_u8(vreinterpretq_u8_u16(p[0]), vreinterpretq_u8_u16(p[1]));
      const uint8x16_t high = vuzp1q_u8(vreinterpretq_u8_u16(p[2]), vreinterpretq_u8_u16(p[3]));
      uint8x16_t sums = vpaddq_u8(byte_bits(low), byte_bits(high));
      sums = vpaddq_u8(sums, sums);
      sums = vpaddq_u8(sums, sums);
      return vgetq_lane_u32(vreinterpretq_u32_u8(sums), 0);
    } else if constexpr (sizeof(Bits) == 4) {
      const uint16x8_t low = vuzp1q_u16(vreinterpretq_u16_u32(p[0]), vreinterpretq_u16_u32(p[1]));
      const uint16x8_t high = vuzp1q_u16(vreinterpretq_u16_u32(p[2]), vreinterpretq_u16_u32(p[3]));
      uint8x16_t sums = byte_bits(vuzp1q_u8(vreinterpretq_u8_u16(low), vreinterpretq_u8_u16(high)));
      sums = vpaddq_u8(sums, sums);
      sums = vpaddq_u8(sums, sums);
      sums = vpaddq_u8(sums, sums);
      return vgetq_lane_u16(vreinterpretq_u16_u8(sums), 0);
    } else {
      const uint32x4_t low = vuzp1q_u32(vreinterpretq_u32_u64(p[0]), vreinterpretq_u32_u64(p[1]));
      const uint32x4_t high = vuzp1q_u32(vreinterpretq_u32_u64(p[2]), vreinterpretq_u32_u64(p[3]));
      const uint16x8_t all = vuzp1q_u16(vreinterpretq_u16_u32(low), vreinterpretq_u16_u32(high));
      constexpr std::uint16_t kBits[8] = {1, 2, 4, 8, 16, 32, 64, 128};
      return vaddvq_u16(vandq_u16(all, vld1q_u16(kBits)));
    }
  }
  static Reg keep(const Reg& r, std::uint64_t bits) {
    Bits lane_bits[kEach];
    for (std::size_t i = 0; i < kEach; ++i) lane_bits[i] = static_cast<Bits>(Bits{1} << i);
    const auto lane_bit = One::load(lane_bits);
    return map([&](std::size_t i) {
      return r.part[i] & One::test(One::set1(static_cast<Bits>(bits >> (i * kEach))), lane_bit);
    });
  }
};

}  // namespace
}  // namespace sparsam::SPARSAM_TARGET
