// Results of transposed convolutions, from the phases of their strides.
#pragma once
#include <array>
#include <cstddef>

namespace sparsam {

// Depth, height and width.
using Sizes3 = std::array<std::size_t, 3>;

// For each plane of y, which has `outer` pixels, x has product(stride) phases of `inner` pixels, one after
// the other: y[i] = x[phase i mod stride][offset + i / stride] along each axis. x and y are contiguous
// float32, and do not overlap.
struct Interleaving {
  std::size_t planes;
  Sizes3 stride, inner, offset, outer;
};

// Throws std::invalid_argument if sizes do not match.
void check(const Interleaving& g);

void interleave(const Interleaving& g, const float* x, float* y);

}  // namespace sparsam
