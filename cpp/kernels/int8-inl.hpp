// Kernels for int8 values, written once over Bytes (int8_*.hpp) and Floats. Internal linkage throughout, for
// the reason given in selection-inl.hpp.
#pragma once
#include "activations-inl.hpp"
#include "int8.hpp"
#include "sparsam/check.hpp"
#include "stores-inl.hpp"

namespace sparsam::SPARSAM_TARGET {
namespace {

// Without fused operations: generic machines have none, and results are the same everywhere.
struct Unfused : Floats {
  static Reg fma(Reg a, Reg b, Reg c) { return add(mul(a, b), c); }
};

SPARSAM_INLINE std::uint32_t float_bits(const float* p) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return bits;
}
SPARSAM_INLINE std::uint32_t float_bits(const std::uint16_t* p) { return std::uint32_t{*p} << 16; }
SPARSAM_INLINE float float_of(std::uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

// Magnitudes are compared as integers, which order infinities and NaN above all numbers.
template <class X>
std::uint32_t largest_of(const X* x, std::size_t n) {
  std::uint32_t most = 0;
  for (std::size_t i = 0; i < n; ++i) {
    const std::uint32_t magnitude = float_bits(x + i) & 0x7fffffff;
    most = magnitude > most ? magnitude : most;
  }
  return most;
}

// Adding 1.5 * 2^23 rounds to an integer, which then stands in the lowest bits.
template <class X>
float round_to_bytes(const X* x, std::size_t n, std::uint32_t most, std::uint8_t* to) {
  constexpr std::uint32_t kInfinity = 0x7f800000, kLeast = 0x0f800000;  // 2^-96
  if (most < kLeast || most >= kInfinity) {
    __builtin_memset(to, kInt8Zero, n);
    return most < kLeast ? 0.0f : float_of(0x7fc00000);
  }
  const float largest = float_of(most), inverse = 127.0f / largest;
  for (std::size_t i = 0; i < n; ++i) {
    const float rounded = float_of(float_bits(x + i)) * inverse + 12582912.0f;
    to[i] = static_cast<std::uint8_t>(float_bits(&rounded) ^ 0x80);
  }
  return largest / 127.0f;
}

template <class X>
float quantise_row(const X* x, std::size_t n, std::uint8_t* to) {
  return round_to_bytes(x, n, largest_of(x, n), to);
}

std::uint32_t largest(const float* x, std::size_t n) { return largest_of(x, n); }

float round_floats(const float* x, std::size_t n, std::uint32_t most, std::uint8_t* to) {
  return round_to_bytes(x, n, most, to);
}

float quantise(const void* x, bool narrow, std::size_t n, std::uint8_t* to) {
  return narrow ? quantise_row(static_cast<const std::uint16_t*>(x), n, to)
                : quantise_row(static_cast<const float*>(x), n, to);
}

template <std::size_t kValue>
struct Constant {
  constexpr std::size_t operator()() const { return kValue; }
};

// What follows the sums.
struct Int8Rows {
  std::size_t rows;
  const std::uint32_t* of_lane;  // `rows` where there is none; null where lanes are rows
  const float* scales;           // of each lane; null where sums are scaled
  const Epilogue& epilogue;
  const Output& y;

  // Of lanes [lane, lane + kLanes) and `batch` rows of x: sums lie `stride` apart. Rows that are neighbours
  // leave together.
  void finish(std::size_t lane, const float* sums, std::size_t stride, const float* x_scale,
              std::size_t batch) const {
    std::uint32_t own[kLanes];
    const std::uint32_t* const row = of_lane == nullptr ? own : of_lane + lane;
    for (std::size_t i = 0; of_lane == nullptr && i < kLanes; ++i)
      own[i] = static_cast<std::uint32_t>(lane + i < rows ? lane + i : rows);
    // Nearly always all lanes have a row, and these are neighbours; a row that is none comes last.
    std::size_t count = kLanes;
    std::uint32_t apart = 0;
    for (std::uint32_t i = 0; i < kLanes; ++i) apart |= row[i] ^ (*row + i);
    bool neighbours = apart == 0 && row[kLanes - 1] < rows;
    if (!neighbours) {
      neighbours = true;
      for (count = 0; count < kLanes && row[count] < rows; ++count)
        neighbours = neighbours && row[count] == *row + count;
      if (count == 0) return;
    }
    const Floats::Reg scale = scales == nullptr ? Floats::set1(1.0f) : Floats::load(scales + lane);
    Floats::Reg bias = Floats::zero();
    if (epilogue.bias != nullptr)
      bias = neighbours ? Floats::load_partial(epilogue.bias + *row, count) : gather(row, count);
    if (neighbours && count == kLanes && !y.narrow && epilogue.activation == Activation::none) {
      float* to = static_cast<float*>(y.data) + *row;
      for (std::size_t t = 0; t < batch; ++t, to += y.stride)
        Floats::store(to, scaled(sums + t * stride, scale, x_scale[t], bias));
      return;
    }
    for (std::size_t t = 0; t < batch; ++t) {
      const Floats::Reg out =
          activate<Unfused>(scaled(sums + t * stride, scale, x_scale[t], bias), epilogue.activation);
      if (y.narrow)
        leave(out, static_cast<Bfloat*>(y.data) + t * y.stride, row, count, neighbours);
      else
        leave(out, static_cast<float*>(y.data) + t * y.stride, row, count, neighbours);
    }
  }

 private:
  // Without a bias it is 0, which changes nothing but the sign of a zero.
  static SPARSAM_INLINE Floats::Reg scaled(const float* sums, Floats::Reg scale, float x_scale,
                                           Floats::Reg bias) {
    return Floats::add(Floats::mul(Floats::load(sums), Floats::mul(scale, Floats::set1(x_scale))), bias);
  }

  Floats::Reg gather(const std::uint32_t* row, std::size_t count) const {
    float bias[kLanes] = {};
    for (std::size_t i = 0; i < count; ++i) bias[i] = epilogue.bias[row[i]];
    return Floats::load(bias);
  }

  template <class Y>
  static SPARSAM_INLINE void leave(Floats::Reg out, Y* to, const std::uint32_t* row, std::size_t count,
                                   bool neighbours) {
    if (neighbours) {
      store_y(to + *row, out, count);
      return;
    }
    Y lanes[kLanes];
    store_y(lanes, out, kLanes);
    for (std::size_t i = 0; i < count; ++i) to[row[i]] = lanes[i];
  }
};

// y from row t on.
[[maybe_unused]] Output row_of(const Output& y, std::size_t t) {
  const std::size_t bytes = t * y.stride * (y.narrow ? sizeof(Bfloat) : sizeof(float));
  return {static_cast<char*>(y.data) + bytes, y.stride, y.narrow};
}

// body(n) with a constant n, the number of rows of x.
template <class Body>
void with_batch(std::size_t batch, Body&& body) {
  if (batch == 1) body(Constant<1>{});
  if (batch == 2) body(Constant<2>{});
  if (batch == 3) body(Constant<3>{});
  if (batch == 4) body(Constant<4>{});
  if (batch == 5) body(Constant<5>{});
  if (batch == 6) body(Constant<6>{});
  if (batch == 7) body(Constant<7>{});
  if (batch == 8) body(Constant<8>{});
}

}  // namespace
}  // namespace sparsam::SPARSAM_TARGET
