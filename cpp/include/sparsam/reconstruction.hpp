// New values for the kept weights, which compensate for the pruned ones: the column sweep of optimal brain
// surgery, and least squares on a support.
#pragma once
#include <cstddef>
#include <cstdint>

namespace sparsam {

constexpr std::size_t kSweepColumns = 256;

// Integers times a scale: the columns of a matrix are cut into groups of `group`, and a weight becomes
// scales[row * groups + column / group] times an integer of at most `most` (below 2^22) in magnitude. Such
// products are exact in T.
template <class T>
struct Grid {
  const T* scales;
  std::size_t groups, group;
  T most;
};

// A rows x stride matrix of weights, in place, one block of columns [first, first + cols) after the other, at
// most kSweepColumns each; see kernels/reconstruction.hpp. w, keep and errors are whole matrices of that
// shape, u is upper triangular, stride x stride with zeros below the diagonal and a positive diagonal. With
// m > 0, which divides cols, the sweep keeps n of every m and writes keep.
template <class T>
struct Sweep {
  T* w;
  std::uint8_t* keep;
  T* errors;
  const T* u;
  std::size_t rows, stride;

  void propagate_errors(std::size_t first, std::size_t cols) const;
  void sweep(std::size_t first, std::size_t cols, std::size_t n, std::size_t m) const;
  // Uses `keep` as it is, and rounds each kept weight to the grid when the sweep reaches it.
  void rounding_sweep(std::size_t first, std::size_t cols, const Grid<T>& grid) const;
};

// For every row r in `order`, once each: x with H_SS x = b_S, where S are the columns with keep[r] set and b
// is row r of `sides`; replaces b by x, 0 outside S. h is cols x cols, symmetric positive semidefinite; a
// column of S whose pivot is at most tolerance times its diagonal depends on those before it and gets 0.
// Group g consists of rows order[starts[g]], ..., order[starts[g + 1] - 1], all with the same S; it needs one
// factorisation.
struct SupportSystems {
  const double* h;
  const std::uint8_t* keep;
  double* sides;
  std::size_t cols;
  const std::int64_t* order;
  const std::int64_t* starts;
  std::size_t groups;
  double tolerance;

  void solve() const;
};

}  // namespace sparsam
