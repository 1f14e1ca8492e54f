// Norms and other row-wise steps, written once over Floats. Include after activations-inl.hpp.
#pragma once
#include "activations-inl.hpp"
#include "steps.hpp"
#include "stores-inl.hpp"

namespace sparsam::SPARSAM_TARGET {
namespace {

SPARSAM_INLINE Floats::Reg load_lanes(const float* p, std::size_t n) {
  return n == kLanes ? Floats::load(p) : Floats::load_partial(p, n);
}

// 0 in all lanes but the first n.
SPARSAM_INLINE Floats::Reg first_lanes_of(Floats::Reg r, std::size_t n) {
  if (n == kLanes) return r;
  float lanes[kLanes];
  Floats::store(lanes, r);
  return Floats::load_partial(lanes, n);
}

// body(sum, at, lanes) for the vectors of a row, which is always the same order: `sum` says which of four
// sums a vector belongs to, since an addition takes as long as several loads.
constexpr std::size_t kRowSums = 4;
template <class Body>
SPARSAM_INLINE void for_vectors(std::size_t width, Body body) {
  std::size_t at = 0;
  for (; at + kRowSums * kLanes <= width; at += kRowSums * kLanes)
#pragma GCC unroll 4
    for (std::size_t s = 0; s < kRowSums; ++s) body(s, at + s * kLanes, kLanes);
  for (; at + kLanes <= width; at += kLanes) body(0, at, kLanes);
  if (at < width) body(0, at, width - at);
}

struct RowSums {
  Floats::Reg sum[kRowSums];
  RowSums() {
    for (Floats::Reg& s : sum) s = Floats::zero();
  }
  float total() const {
    return Floats::sum(Floats::add(Floats::add(sum[0], sum[1]), Floats::add(sum[2], sum[3])));
  }
};

// x of a row, which is written where it is a sum; add(s, x) for its vectors.
template <class Add>
SPARSAM_INLINE const float* row_of_norm(const NormRows& n, std::size_t row, Add add) {
  const float* const a = n.a + row * n.width;
  if (n.b == nullptr) {
    for_vectors(n.width, [&](std::size_t s, std::size_t at, std::size_t lanes)
                             __attribute__((always_inline)) { add(s, load_lanes(a + at, lanes)); });
    return a;
  }
  const float* const b = n.b + row * n.width;
  float* const x = (n.sum != nullptr ? n.sum : n.y) + row * n.width;
  for_vectors(n.width, [&](std::size_t s, std::size_t at, std::size_t lanes) __attribute__((always_inline)) {
    const Floats::Reg both = Floats::add(load_lanes(a + at, lanes), load_lanes(b + at, lanes));
    store_y(x + at, both, lanes);
    add(s, both);
  });
  return x;
}

// In two passes: squares are of differences from the mean, so that nothing cancels. The mean of these
// differences, 0 but for the rounding of the mean, is taken away as well, for rows that are nearly constant.
inline void layer_norm(const NormRows& n) {
  const auto width = static_cast<float>(n.width);
  for (std::size_t row = 0; row < n.rows; ++row) {
    RowSums first, second, squares;
    const float* const x =
        row_of_norm(n, row, [&](std::size_t s, Floats::Reg v) __attribute__((always_inline)) {
          first.sum[s] = Floats::add(first.sum[s], v);
        });
    const Floats::Reg mean = Floats::set1(first.total() / width);
    for_vectors(n.width,
                [&](std::size_t s, std::size_t at, std::size_t lanes) __attribute__((always_inline)) {
                  const Floats::Reg d = first_lanes_of(Floats::sub(load_lanes(x + at, lanes), mean), lanes);
                  second.sum[s] = Floats::add(second.sum[s], d);
                  squares.sum[s] = Floats::fma(d, d, squares.sum[s]);
                });
    const float shift = second.total() / width, raw = squares.total() / width - shift * shift;
    const float variance = raw < 0.0f ? 0.0f : raw;  // NaN stays
    const Floats::Reg rest = Floats::set1(shift),
                      scale = Floats::set1(1.0f / __builtin_sqrtf(variance + n.eps));
    float* const y = n.y + row * n.width;
    for_vectors(n.width, [&](std::size_t, std::size_t at, std::size_t lanes) __attribute__((always_inline)) {
      const Floats::Reg d = Floats::sub(Floats::sub(load_lanes(x + at, lanes), mean), rest);
      Floats::Reg out = Floats::mul(d, scale);
      if (n.weight != nullptr) out = Floats::mul(out, load_lanes(n.weight + at, lanes));
      if (n.bias != nullptr) out = Floats::add(out, load_lanes(n.bias + at, lanes));
      store_y(y + at, out, lanes);
    });
  }
}

inline void rms_norm(const NormRows& n) {
  const auto width = static_cast<float>(n.width);
  for (std::size_t row = 0; row < n.rows; ++row) {
    RowSums squares;
    const float* const x =
        row_of_norm(n, row, [&](std::size_t s, Floats::Reg v) __attribute__((always_inline)) {
          squares.sum[s] = Floats::fma(v, v, squares.sum[s]);
        });
    const Floats::Reg scale = Floats::set1(1.0f / __builtin_sqrtf(squares.total() / width + n.eps));
    float* const y = n.y + row * n.width;
    for_vectors(n.width, [&](std::size_t, std::size_t at, std::size_t lanes) __attribute__((always_inline)) {
      Floats::Reg out = Floats::mul(load_lanes(x + at, lanes), scale);
      if (n.weight != nullptr) out = Floats::mul(out, load_lanes(n.weight + at, lanes));
      store_y(y + at, out, lanes);
    });
  }
}

inline void add_rows(const float* a, const float* b, std::size_t n, float* y) {
  for_vectors(n, [&](std::size_t, std::size_t at, std::size_t lanes) __attribute__((always_inline)) {
    store_y(y + at, Floats::add(load_lanes(a + at, lanes), load_lanes(b + at, lanes)), lanes);
  });
}

inline void activate_rows(const float* x, std::size_t n, Activation activation, float* y) {
  for (std::size_t at = 0; at < n; at += kLanes) {
    const std::size_t lanes = n - at < kLanes ? n - at : kLanes;
    store_y(y + at, activate(load_lanes(x + at, lanes), activation), lanes);
  }
}

inline void gate_rows(const float* g, const float* u, std::size_t n, Activation activation, float* y) {
  for (std::size_t at = 0; at < n; at += kLanes) {
    const std::size_t lanes = n - at < kLanes ? n - at : kLanes;
    const Floats::Reg open = activate(load_lanes(g + at, lanes), activation);
    store_y(y + at, Floats::mul(open, load_lanes(u + at, lanes)), lanes);
  }
}

}  // namespace
}  // namespace sparsam::SPARSAM_TARGET
