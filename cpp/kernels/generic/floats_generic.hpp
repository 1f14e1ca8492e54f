// Floats and Doubles for any machine: lanes in an array.
#pragma once
#include <cstddef>
#include <cstdint>

#include "half.hpp"
#include "step_counts.hpp"

namespace sparsam::generic {
namespace {

struct Floats {
  static constexpr std::size_t kLanes = 8;
  static constexpr bool kOneRegister = false;  // a Reg takes several
  static constexpr bool kEightSums = false;    // stay in registers
  static constexpr bool kFetches = false;      // values are computed with for longer than they take to come
  using Counts = StepCounts<kLanes>;
  struct Reg {
    float lane[kLanes];
  };

  template <class F>
  static Reg map(F f) {
    Reg r;
    for (std::size_t i = 0; i < kLanes; ++i) r.lane[i] = f(i);
    return r;
  }
  static Reg set1(float x) {
    return map([&](std::size_t) { return x; });
  }
  static Reg zero() { return set1(0.0f); }
  static Reg load(const float* p) {
    return map([&](std::size_t i) { return p[i]; });
  }
  static Reg load_partial(const float* p, std::size_t n) {
    return map([&](std::size_t i) { return i < n ? p[i] : 0.0f; });
  }
  static void store(float* p, Reg r) { __builtin_memcpy(p, &r, sizeof r); }
  static void store_partial(float* p, Reg r, std::size_t n) { __builtin_memcpy(p, &r, n * sizeof(float)); }
  static Reg add(Reg a, Reg b) {
    return map([&](std::size_t i) { return a.lane[i] + b.lane[i]; });
  }
  static Reg sub(Reg a, Reg b) {
    return map([&](std::size_t i) { return a.lane[i] - b.lane[i]; });
  }
  static Reg mul(Reg a, Reg b) {
    return map([&](std::size_t i) { return a.lane[i] * b.lane[i]; });
  }
  static Reg div(Reg a, Reg b) {
    return map([&](std::size_t i) { return a.lane[i] / b.lane[i]; });
  }
  static Reg fma(Reg a, Reg b, Reg c) {
    return map([&](std::size_t i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
  }
  // b if either is NaN, as on x86.
  static Reg max(Reg a, Reg b) {
    return map([&](std::size_t i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
  }
  static Reg min(Reg a, Reg b) {
    return map([&](std::size_t i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
  }
  static Reg abs(Reg a) {
    return map([&](std::size_t i) { return __builtin_fabsf(a.lane[i]); });
  }
  static Reg copysign(Reg a, Reg b) {
    return map([&](std::size_t i) { return __builtin_copysignf(a.lane[i], b.lane[i]); });
  }
  // Adding and taking away 1.5 * 2^23 rounds |x| < 2^22 to an integer.
  static Reg round(Reg a) {
    return map([&](std::size_t i) { return (a.lane[i] + 12582912.0f) - 12582912.0f; });
  }
  // a * 2^n for integers n in [-126, 127]
  static Reg scale(Reg a, Reg n) {
    return map([&](std::size_t i) {
      const auto bits = static_cast<std::uint32_t>(static_cast<std::int32_t>(n.lane[i]) + 127) << 23;
      float power;
      __builtin_memcpy(&power, &bits, sizeof power);
      return a.lane[i] * power;
    });
  }
  // table[i], i being the lowest four bits of each lane.
  static Reg lookup(const float (&table)[16], Reg bits) {
    return map([&](std::size_t i) {
      std::uint32_t lane;
      __builtin_memcpy(&lane, bits.lane + i, sizeof lane);
      return table[lane & 15];
    });
  }
  static float sum(Reg r) {
    return ((r.lane[0] + r.lane[4]) + (r.lane[2] + r.lane[6])) +
           ((r.lane[1] + r.lane[5]) + (r.lane[3] + r.lane[7]));
  }
  // The largest lane; of NaN and a number, either.
  static float largest(Reg r) {
    float most = r.lane[0];
    for (std::size_t i = 1; i < kLanes; ++i) most = r.lane[i] > most ? r.lane[i] : most;
    return most;
  }
  static void keep_in_register(Reg&) {}
  static void transpose(Reg (&r)[kLanes]) {
    for (std::size_t i = 0; i < kLanes; ++i)
      for (std::size_t j = 0; j < i; ++j) {
        const float t = r[i].lane[j];
        r[i].lane[j] = r[j].lane[i];
        r[j].lane[i] = t;
      }
  }
  template <class Value>
  static void broadcast4(const Value* p, Reg (&w)[4]) {
    for (std::size_t i = 0; i < 4; ++i) w[i] = set1(to_float(p[i]));
  }
  static Reg load_values(const Bfloat* p) {
    return map([&](std::size_t i) { return to_float(p[i]); });
  }
  template <class Value>
  static PackedStep<Value> expanded(const Value* p, std::uint32_t bits) {
    return {p, bits};
  }
  // sum + w * x in the lanes of the step.
  template <class Value>
  static Reg fma_expanded(PackedStep<Value> step, Reg x, Reg sum) {
    const Value* p = step.values;
    const std::uint32_t bits = step.bits;
    for (std::size_t i = 0; i < kLanes; ++i)
      if ((bits >> i & 1) != 0) sum.lane[i] += to_float(*p++) * x.lane[i];
    return sum;
  }
};

// Two lanes in the vectors of the compiler: every machine has 16-byte registers, and compilers do not
// reliably keep a structure of lanes in them.
struct Doubles {
  static constexpr std::size_t kLanes = 2;
  static constexpr std::size_t kSums = 8;  // registers for sums, in Floats as well: half of them
  using Reg = double __attribute__((vector_size(16)));

  static Reg set1(double x) { return Reg{x, x}; }
  static Reg zero() { return set1(0.0); }
  static Reg load(const double* p) { return Reg{p[0], p[1]}; }
  static void store(double* p, Reg r) { __builtin_memcpy(p, &r, sizeof r); }
  static Reg sub(Reg a, Reg b) { return a - b; }
  static Reg mul(Reg a, Reg b) { return a * b; }
  static Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }
  static double sum(Reg r) { return r[0] + r[1]; }
};

}  // namespace
}  // namespace sparsam::generic
