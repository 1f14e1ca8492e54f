// Products of second moments, written once over Floats and Doubles. Include after defining SPARSAM_TARGET and
// including its floats_*.hpp. Internal linkage throughout, for the reason given in selection-inl.hpp.
#pragma once
#include "lanes.hpp"
#include "moments.hpp"

namespace sparsam::SPARSAM_TARGET {
namespace {

// The sums of kHigh columns of a by two vectors of b live in registers.
template <class T>
struct Sums {
  using Lanes = typename LanesOf<T>::type;
  static constexpr std::size_t kWide = 2 * Lanes::kLanes, kHigh = Doubles::kSums / 2;
  static_assert(kMomentPanel % kWide == 0 && kMomentPanel % kHigh == 0);

  static void products(const T* a, const T* b, std::size_t rows, T* sums) {
    typename Lanes::Reg left[kHigh], right[kHigh];
#pragma GCC unroll 16
    for (std::size_t i = 0; i < kHigh; ++i) left[i] = right[i] = Lanes::zero();
    for (std::size_t k = 0; k < rows; ++k, a += kMomentPanel, b += kMomentPanel) {
      const auto first = Lanes::load(b), second = Lanes::load(b + Lanes::kLanes);
#pragma GCC unroll 16
      for (std::size_t i = 0; i < kHigh; ++i) {
        const auto factor = Lanes::set1(a[i]);
        left[i] = Lanes::fma(factor, first, left[i]);
        right[i] = Lanes::fma(factor, second, right[i]);
      }
    }
#pragma GCC unroll 16
    for (std::size_t i = 0; i < kHigh; ++i) {
      Lanes::store(sums + i * kWide, left[i]);
      Lanes::store(sums + i * kWide + Lanes::kLanes, right[i]);
    }
  }
};

template <class T>
void add_products(const T* a, const T* b, std::size_t rows, const double* a_scale, const double* b_scale,
                  double* tile, std::size_t stride) {
  using S = Sums<T>;
  alignas(64) T sums[S::kHigh * S::kWide];
  for (std::size_t j = 0; j < kMomentPanel; j += S::kWide)
    for (std::size_t i = 0; i < kMomentPanel; i += S::kHigh) {
      S::products(a + i, b + j, rows, sums);
      for (std::size_t r = 0; r < S::kHigh; ++r) {
        double* to = tile + (i + r) * stride + j;
        for (std::size_t c = 0; c < S::kWide; ++c)
          to[c] += static_cast<double>(sums[r * S::kWide + c]) * b_scale[j + c] * a_scale[i + r];
      }
    }
}

constexpr MomentKernels kMomentKernels = {&add_products<float>, &add_products<double>};

}  // namespace
}  // namespace sparsam::SPARSAM_TARGET
