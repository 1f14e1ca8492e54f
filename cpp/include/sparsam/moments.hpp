// Second moments: sums of products of the columns of two matrices, added to tiles of float64.
#pragma once
#include <cstddef>

namespace sparsam {

// The largest height and width of a tile: one tile stays in the L2 cache together with its factors.
constexpr std::size_t kMomentTile = 128;

// A matrix of rows x cols in C order; the value of column j is scale[j] times what is stored.
template <class T>
struct ScaledMatrix {
  const T* data;
  std::size_t rows, cols;
  const double* scale;
};

// Adds A^T B to a matrix of a.cols x b.cols that is cut into tiles of edge_a x edge_b, which are multiples of
// 32 and at most kMomentTile: row by row of tiles, each contiguous, padded at the far edges. With `upper`,
// for A = B, there are only the tiles from the diagonal to the right, and numbers left of the diagonal are
// undefined. Sums of up to 128 rows are rounded to T, the others to double.
template <class T>
void add_products(const ScaledMatrix<T>& a, const ScaledMatrix<T>& b, std::size_t edge_a, std::size_t edge_b,
                  bool upper, double* tiles);

// How many numbers these tiles hold.
std::size_t moment_numbers(std::size_t a_cols, std::size_t b_cols, std::size_t edge_a, std::size_t edge_b,
                           bool upper);

}  // namespace sparsam
