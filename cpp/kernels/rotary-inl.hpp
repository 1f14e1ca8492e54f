// Rotary position embedding, written once over Floats. Include after steps-inl.hpp.
#pragma once
#include "steps-inl.hpp"

namespace sparsam::SPARSAM_TARGET {
namespace {

// Halves of a head are the two coordinates of its points. Products are rounded before they are added, as
// PyTorch's are.
inline void rotary(const RotaryRows& n) {
  const std::size_t half = n.depth / 2, width = n.heads * n.depth;
  for (std::size_t row = 0; row < n.rows; ++row) {
    const float *const cos = n.cos + row * n.depth, *const sin = n.sin + row * n.depth;
    for (std::size_t h = 0; h < n.heads; ++h) {
      const float* const x = n.x + row * width + h * n.depth;
      float* const y = n.y + row * width + h * n.depth;
      for (std::size_t at = 0; at < half; at += kLanes) {
        const std::size_t lanes = half - at < kLanes ? half - at : kLanes;
        const Floats::Reg a = load_lanes(x + at, lanes), b = load_lanes(x + half + at, lanes);
        store_y(y + at,
                Floats::sub(Floats::mul(a, load_lanes(cos + at, lanes)),
                            Floats::mul(b, load_lanes(sin + at, lanes))),
                lanes);
        store_y(y + half + at,
                Floats::add(Floats::mul(b, load_lanes(cos + half + at, lanes)),
                            Floats::mul(a, load_lanes(sin + half + at, lanes))),
                lanes);
      }
    }
  }
}

constexpr StepKernels kStepKernels = {&layer_norm, &rms_norm, &add_rows, &activate_rows, &gate_rows, &rotary};

}  // namespace
}  // namespace sparsam::SPARSAM_TARGET
