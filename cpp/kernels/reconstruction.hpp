// Arguments of the reconstruction kernels, and the table of these kernels. Plain data; no STL.
#pragma once
#include <cstddef>
#include <cstdint>

namespace sparsam {

// The largest number of columns of one sweep: its rows and their updates stay in the L1 cache.
constexpr std::size_t kMaxSweepColumns = 256;
// Rows that are swept together, and columns that the panel of a block is cut into.
constexpr std::size_t kSweepRows = 8, kSweepTile = 32;

// Triangles are worked on in tiles of this many columns; strides of theirs are multiples of it.
constexpr std::size_t kTriangleTile = 16;
// Rows of a triangle that are eliminated together.
constexpr std::size_t kTrianglePanel = 32;

// The columns [first, first + cols) of a matrix: w, keep and errors point to column `first` of row 0, and
// their rows are `stride` apart.
template <class T>
struct SweepBlock {
  T* w;
  std::uint8_t* keep;  // 1 where a weight is kept, 0 where it is pruned
  T* errors;
  std::size_t stride, first, cols;
  // The block's triangle U, cols rows of u_stride numbers: zeros below the diagonal and past the columns;
  // u_stride is a multiple of kSweepTile.
  const T* u;
  std::size_t u_stride;
  const T* panel;  // U above the triangle: [tile of columns][row < first][kSweepTile], zeros past the columns
  // Keep the n largest |w| / U_jj of every m columns, which divides cols; with m = 0, use `keep` as it is.
  std::size_t n, m;
  // Of a rounding sweep: column j of row r becomes scales[r * groups + (first + j) / group] times an integer
  // of at most `most`, and such products are exact in T.
  const T* scales;
  std::size_t groups, group;
  T most;
};

// Rows [begin, end). Finite weights; no overlaps.
template <class T>
struct SweepKernels {
  // Applies the updates of the columns before the block: w -= (errors before the block) * panel.
  void (*propagate_errors)(const SweepBlock<T>& block, std::size_t begin, std::size_t end);
  // Optimal brain surgery column by column: a pruned weight becomes 0, and later columns of the block are
  // updated to compensate for it: e = w_j / U_jj, w_i -= e U_ji for i > j. Writes e to errors, 0 where kept.
  // With m > 0 it chooses group by group from the updated weights, ties to the lower index, and writes keep.
  void (*sweep)(const SweepBlock<T>& block, std::size_t begin, std::size_t end);
  // The same with m = 0, but kept weights are rounded (to nearest, ties to even) when they are reached, and
  // later columns compensate for that too: e = (w_j - rounded) / U_jj.
  void (*rounding_sweep)(const SweepBlock<T>& block, std::size_t begin, std::size_t end);
};

struct ReconstructionKernels {
  SweepKernels<float> f32;
  SweepKernels<double> f64;
  // a holds, row by row with that stride, the upper triangle of a symmetric positive semidefinite matrix A of
  // n columns, and `count` right-hand sides in the columns after it; zeros below the diagonal in its tile and
  // in the rows up to the next multiple of kTriangleTile. On return right-hand side k is replaced by a
  // solution of A x = b in solutions[k * stride + i], i < n; a is overwritten. A column whose pivot is at
  // most tolerance times its diagonal (n numbers: those of A) depends on those before it: its x is 0. panel:
  // room for kTrianglePanel
  // * stride numbers; the stride is a multiple of kTriangleTile, at least n + count. No overlaps.
  void (*solve)(double* a, std::size_t n, std::size_t count, std::size_t stride, const double* diagonal,
                double tolerance, double* panel, double* solutions);
};

}  // namespace sparsam
