// The kernels of second moments, and the table of them. Plain data; no STL.
#pragma once
#include <cstddef>

namespace sparsam {

// Columns of a packed panel; a kernel adds the products of two panels.
constexpr std::size_t kMomentPanel = 32;
// Rows whose products are summed up in their own type before they are added in double: the error bound of
// InputStatistics depends on it, and two panels of that many rows stay in the L1 cache.
constexpr std::size_t kMomentRows = 128;

// Panels a and b are [rows][kMomentPanel], rows <= kMomentRows; the tile [kMomentPanel][kMomentPanel] has
// rows `stride` apart. tile[i][j] += a_scale[i] * b_scale[j] * (sum of a[.][i] * b[.][j]). No overlaps, but a
// may be b.
template <class T>
using AddProducts = void (*)(const T* a, const T* b, std::size_t rows, const double* a_scale,
                             const double* b_scale, double* tile, std::size_t stride);

struct MomentKernels {
  AddProducts<float> f32;
  AddProducts<double> f64;
};

}  // namespace sparsam
