// Vec for any machine: eight lanes in an array; the compiler vectorises the loops for the baseline.
#pragma once
#include <cstddef>
#include <cstdint>

namespace sparsam::generic {
namespace {

template <class Bits>
struct Vec {
  static constexpr std::size_t kLanes = 8;
  static constexpr Bits kKeyMask = static_cast<Bits>(static_cast<Bits>(~Bits{0}) >> 1);
  struct Reg {
    Bits lane[kLanes];
  };

  static Reg load(const Bits* p) {
    Reg r;
    __builtin_memcpy(&r, p, sizeof r);
    return r;
  }
  static void store(Bits* p, Reg r) { __builtin_memcpy(p, &r, sizeof r); }
  static Reg set1(Bits b) {
    Reg r;
    for (Bits& lane : r.lane) lane = b;
    return r;
  }
  static Reg key(Reg r) {
    for (Bits& lane : r.lane) lane = static_cast<Bits>(lane & kKeyMask);
    return r;
  }
  static Reg add(Reg a, Reg b) {
    for (std::size_t i = 0; i < kLanes; ++i) a.lane[i] = static_cast<Bits>(a.lane[i] + b.lane[i]);
    return a;
  }
  static Reg max(Reg a, Reg b) {
    for (std::size_t i = 0; i < kLanes; ++i) a.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i];
    return a;
  }
  using Lanes = Reg;  // all ones or 0 in each
  static Lanes less(Reg a, Reg b) {
    for (std::size_t i = 0; i < kLanes; ++i)
      a.lane[i] = static_cast<Bits>(a.lane[i] < b.lane[i] ? ~Bits{0} : 0);
    return a;
  }
  static std::uint64_t bits(Lanes lanes) {
    std::uint64_t bits = 0;
    for (std::size_t i = 0; i < kLanes; ++i) bits |= std::uint64_t{lanes.lane[i] & 1u} << i;
    return bits;
  }
  static Reg tally(Reg counts, Lanes lanes) {
    for (std::size_t i = 0; i < kLanes; ++i)
      counts.lane[i] = static_cast<Bits>(counts.lane[i] - lanes.lane[i]);
    return counts;
  }
  static Reg keep(Reg r, std::uint64_t bits) {
    for (std::size_t i = 0; i < kLanes; ++i)
      r.lane[i] = static_cast<Bits>(r.lane[i] & static_cast<Bits>(0 - ((bits >> i) & 1)));
    return r;
  }
};

}  // namespace
}  // namespace sparsam::generic
