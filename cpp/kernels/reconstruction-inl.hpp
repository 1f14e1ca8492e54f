// Reconstruction kernels, written once over Floats and Doubles. Include after defining SPARSAM_TARGET and
// including its floats_*.hpp. Internal linkage throughout, for the reason given in selection-inl.hpp.
#pragma once
#include "lanes.hpp"
#include "reconstruction.hpp"

namespace sparsam::SPARSAM_TARGET {
namespace {

// A tile of sums, kColumns wide and kRows high, takes about half of the vector registers.
template <class T>
struct TileOf {
  using Lanes = typename LanesOf<T>::type;
  static constexpr std::size_t kColumns = kSweepTile, kVectors = kColumns / Lanes::kLanes;
  static constexpr std::size_t kRows = Doubles::kSums < kVectors ? 1 : Doubles::kSums / kVectors;
};

// kRows rows by one tile of columns: w -= errors[.., 0, depth) * panel[depth][kColumns].
template <class T, std::size_t kRows>
void propagate_into_tile(T* w, const T* errors, std::size_t stride, const T* panel, std::size_t depth) {
  using Tile = TileOf<T>;
  using Lanes = typename Tile::Lanes;
  typename Lanes::Reg sum[kRows][Tile::kVectors];
#pragma GCC unroll 8
  for (std::size_t r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (std::size_t v = 0; v < Tile::kVectors; ++v) sum[r][v] = Lanes::zero();
  for (std::size_t p = 0; p < depth; ++p, panel += Tile::kColumns) {
    typename Lanes::Reg column[Tile::kVectors];
#pragma GCC unroll 8
    for (std::size_t v = 0; v < Tile::kVectors; ++v) column[v] = Lanes::load(panel + v * Lanes::kLanes);
#pragma GCC unroll 8
    for (std::size_t r = 0; r < kRows; ++r) {
      const auto error = Lanes::set1(errors[r * stride + p]);
#pragma GCC unroll 8
      for (std::size_t v = 0; v < Tile::kVectors; ++v) sum[r][v] = Lanes::fma(error, column[v], sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (std::size_t r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (std::size_t v = 0; v < Tile::kVectors; ++v) {
      T* to = w + r * kMaxSweepColumns + v * Lanes::kLanes;
      Lanes::store(to, Lanes::sub(Lanes::load(to), sum[r][v]));
    }
}

// As many rows as the sweep holds in its buffer, which is [kSweepRows][kMaxSweepColumns].
template <class T>
void propagate_into_rows(const SweepBlock<T>& block, std::size_t first_row, std::size_t rows, T* buffer) {
  using Tile = TileOf<T>;
  constexpr std::size_t kDepth = 128;  // this much of the panel stays in the L1 cache for all rows
  const T* errors = block.errors + first_row * block.stride - block.first;
  for (std::size_t column = 0; column < block.cols; column += Tile::kColumns)
    for (std::size_t p = 0; p < block.first; p += kDepth) {
      const std::size_t depth = block.first - p < kDepth ? block.first - p : kDepth;
      const T* panel = block.panel + column * block.first + p * Tile::kColumns;
      std::size_t r = 0;
      for (; r + Tile::kRows <= rows; r += Tile::kRows)
        propagate_into_tile<T, Tile::kRows>(buffer + r * kMaxSweepColumns + column,
                                            errors + r * block.stride + p, block.stride, panel, depth);
      for (; r < rows; ++r)
        propagate_into_tile<T, 1>(buffer + r * kMaxSweepColumns + column, errors + r * block.stride + p,
                                  block.stride, panel, depth);
    }
}

template <class T>
void propagate_errors(const SweepBlock<T>& block, std::size_t begin, std::size_t end) {
  alignas(64) T buffer[kSweepRows * kMaxSweepColumns];
  for (std::size_t first = begin; first < end; first += kSweepRows) {
    const std::size_t rows = end - first < kSweepRows ? end - first : kSweepRows;
    for (std::size_t r = 0; r < rows; ++r)
      __builtin_memcpy(buffer + r * kMaxSweepColumns, block.w + (first + r) * block.stride,
                       block.cols * sizeof(T));
    propagate_into_rows(block, first, rows, buffer);
    for (std::size_t r = 0; r < rows; ++r)
      __builtin_memcpy(block.w + (first + r) * block.stride, buffer + r * kMaxSweepColumns,
                       block.cols * sizeof(T));
  }
}

template <class T>
T magnitude(T x) {
  return x < 0 ? -x : x;
}

// Marks the n largest |w| / U_jj of columns [first, first + m): a column is kept if fewer than n others
// precede it, being larger, or equal and further left.
template <class T>
void choose_group(const SweepBlock<T>& block, const T* row, std::size_t first, std::uint8_t* keep) {
  T score[kMaxSweepColumns];
  for (std::size_t i = 0; i < block.m; ++i)
    score[i] = magnitude(row[first + i] / block.u[(first + i) * block.u_stride + first + i]);
  for (std::size_t i = 0; i < block.m; ++i) {
    std::size_t before = 0;
    for (std::size_t k = 0; k < i; ++k) before += score[k] >= score[i];
    for (std::size_t k = i + 1; k < block.m; ++k) before += score[k] > score[i];
    keep[first + i] = before < block.n;
  }
}

// The multiple of `scale` that is nearest to x, ties to even, of at most `most` times it.
template <class T>
T nearest_multiple(T x, T scale, T most) {
  constexpr T kInteger = sizeof(T) == sizeof(float) ? T{0x1.8p23} : T{0x1.8p52};  // sums have no fraction
  T q = x / scale;
  q = q > most ? most : q;
  q = q < -most ? -most : q;
  return ((q + kInteger) - kInteger) * scale;
}

// Column j of kSweepRows rows. A kept weight has the error 0, or its rounding error, and is processed like
// the others: a branch for each weight would often be mispredicted, and several rows hide the latency of one.
// The update starts at the register that contains j: for lanes before j, U is 0.
template <class T, bool kRounding>
void eliminate(const SweepBlock<T>& block, std::size_t j, T* rows,
               const std::uint8_t (*keep)[kMaxSweepColumns], T* errors,
               [[maybe_unused]] const T* const* scales) {
  using Lanes = typename LanesOf<T>::type;
  const std::size_t cols = block.cols;  // a store to the rows might alias it
  const T* u = block.u + j * block.u_stride;
  typename Lanes::Reg factor[kSweepRows];
  [[maybe_unused]] T rounded[kSweepRows];
#pragma GCC unroll 8
  for (std::size_t r = 0; r < kSweepRows; ++r) {
    T x = rows[r * kMaxSweepColumns + j];
    if constexpr (kRounding) {
      const T nearest = nearest_multiple(x, scales[r][(block.first + j) / block.group], block.most);
      rounded[r] = keep[r][j] != 0 ? nearest : T{0};
      x -= rounded[r];
    }
    const T error = x / u[j];
    errors[r * kMaxSweepColumns + j] = !kRounding && keep[r][j] != 0 ? T{0} : error;
    factor[r] = Lanes::set1(-errors[r * kMaxSweepColumns + j]);
  }
  for (std::size_t i = j / Lanes::kLanes * Lanes::kLanes; i < cols; i += Lanes::kLanes) {
    const auto column = Lanes::load(u + i);
#pragma GCC unroll 8
    for (std::size_t r = 0; r < kSweepRows; ++r) {
      T* to = rows + r * kMaxSweepColumns + i;
      Lanes::store(to, Lanes::fma(factor[r], column, Lanes::load(to)));
    }
  }
  if constexpr (kRounding)
    for (std::size_t r = 0; r < kSweepRows; ++r) rows[r * kMaxSweepColumns + j] = rounded[r];
}

// `row` and `keep` are buffers of the sweep's own: without this promise a store would stand between any two
// loads, and the loop has a branch per weight, which is mispredicted every other time.
template <class T>
void zero_pruned(T* __restrict row, const std::uint8_t* __restrict keep, std::size_t cols) {
  for (std::size_t j = 0; j < cols; ++j) row[j] = keep[j] != 0 ? row[j] : T{0};
}

template <class T, bool kRounding>
void sweep(const SweepBlock<T>& block, std::size_t begin, std::size_t end) {
  alignas(64) T rows[kSweepRows * kMaxSweepColumns] = {}, errors[kSweepRows * kMaxSweepColumns];
  std::uint8_t keep[kSweepRows][kMaxSweepColumns];
  [[maybe_unused]] const T* scales[kSweepRows];
  const std::size_t group = block.m != 0 ? block.m : block.cols;
  for (std::size_t first = begin; first < end; first += kSweepRows) {
    const std::size_t count = end - first < kSweepRows ? end - first : kSweepRows;
    for (std::size_t r = 0; r < count; ++r) {
      __builtin_memcpy(rows + r * kMaxSweepColumns, block.w + (first + r) * block.stride,
                       block.cols * sizeof(T));
      __builtin_memcpy(keep[r], block.keep + (first + r) * block.stride, block.cols);
    }
    for (std::size_t r = count; r < kSweepRows; ++r) __builtin_memset(keep[r], 1, block.cols);
    if constexpr (kRounding)
      for (std::size_t r = 0; r < kSweepRows; ++r)
        scales[r] = block.scales + (first + (r < count ? r : 0)) * block.groups;
    for (std::size_t start = 0; start < block.cols; start += group) {
      if (block.m != 0)
        for (std::size_t r = 0; r < count; ++r)
          choose_group(block, rows + r * kMaxSweepColumns, start, keep[r]);
      for (std::size_t j = start; j < start + group; ++j)
        eliminate<T, kRounding>(block, j, rows, keep, errors, scales);
    }
    for (std::size_t r = 0; r < count; ++r) {
      const std::size_t place = (first + r) * block.stride;
      T* row = rows + r * kMaxSweepColumns;
      zero_pruned(row, keep[r], block.cols);
      __builtin_memcpy(block.w + place, row, block.cols * sizeof(T));
      __builtin_memcpy(block.keep + place, keep[r], block.cols);
      __builtin_memcpy(block.errors + place, errors + r * kMaxSweepColumns, block.cols * sizeof(T));
    }
  }
}

constexpr std::size_t kTileVectors = kTriangleTile / Doubles::kLanes;
constexpr std::size_t kTileRows = Doubles::kSums / kTileVectors;

// Rows [first, last) of the triangle, given that all rows before `first` are subtracted already. Row q gets
// the rows of this panel before it subtracted, in registers, and is then divided by the square root of its
// pivot; a row without a pivot becomes 0.
void eliminate_panel(double* a, std::size_t first, std::size_t last, std::size_t stride, double tolerance,
                     const double* diagonal) {
  using V = Doubles;
  for (std::size_t q = first; q < last; ++q) {
    double* row = a + q * stride;
    const std::size_t tile = q / kTriangleTile * kTriangleTile;
    for (std::size_t j = tile; j < stride; j += kTriangleTile) {
      V::Reg sum[kTileVectors];
      for (auto& s : sum) s = V::zero();
      for (std::size_t p = first; p < q; ++p) {
        const auto factor = V::set1(a[p * stride + q]);
        for (std::size_t v = 0; v < kTileVectors; ++v)
          sum[v] = V::fma(factor, V::load(a + p * stride + j + v * V::kLanes), sum[v]);
      }
      for (std::size_t v = 0; v < kTileVectors; ++v)
        V::store(row + j + v * V::kLanes, V::sub(V::load(row + j + v * V::kLanes), sum[v]));
    }
    const double pivot = row[q], bound = tolerance * diagonal[q - first];
    const auto scale = V::set1(pivot > bound ? 1 / __builtin_sqrt(pivot) : 0.0);
    for (std::size_t j = tile; j < stride; j += V::kLanes) V::store(row + j, V::mul(scale, V::load(row + j)));
  }
}

// The columns of the panel's rows from the tile of `from` on, tile by tile: [tile][row of the panel][column].
void pack_panel(const double* a, std::size_t first, std::size_t depth, std::size_t from, std::size_t stride,
                double* panel) {
  for (std::size_t j = from; j < stride; j += kTriangleTile)
    for (std::size_t p = 0; p < depth; ++p, panel += kTriangleTile)
      __builtin_memcpy(panel, a + (first + p) * stride + j, kTriangleTile * sizeof(double));
}

// kTileRows rows by one tile of columns, minus the product of the panel's columns for both.
void subtract_tile(double* a, std::size_t stride, const double* left, const double* right,
                   std::size_t depth) {
  using V = Doubles;
  V::Reg sum[kTileRows][kTileVectors];
#pragma GCC unroll 8
  for (std::size_t r = 0; r < kTileRows; ++r)
#pragma GCC unroll 8
    for (std::size_t v = 0; v < kTileVectors; ++v) sum[r][v] = V::zero();
  for (std::size_t p = 0; p < depth; ++p, left += kTriangleTile, right += kTriangleTile) {
    V::Reg column[kTileVectors];
#pragma GCC unroll 8
    for (std::size_t v = 0; v < kTileVectors; ++v) column[v] = V::load(right + v * V::kLanes);
#pragma GCC unroll 8
    for (std::size_t r = 0; r < kTileRows; ++r) {
      const auto factor = V::set1(left[r]);
#pragma GCC unroll 8
      for (std::size_t v = 0; v < kTileVectors; ++v) sum[r][v] = V::fma(factor, column[v], sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (std::size_t r = 0; r < kTileRows; ++r)
#pragma GCC unroll 8
    for (std::size_t v = 0; v < kTileVectors; ++v) {
      double* to = a + r * stride + v * V::kLanes;
      V::store(to, V::sub(V::load(to), sum[r][v]));
    }
}

// x from U x = y by substitution from the last row up; y is a column of a. A row without a pivot has 0 on its
// diagonal.
void substitute(const double* a, std::size_t n, std::size_t column, std::size_t stride, double* x) {
  using V = Doubles;
  __builtin_memset(x, 0, stride * sizeof(double));
  for (std::size_t p = n; p-- > 0;) {
    const double* row = a + p * stride;
    if (row[p] == 0) continue;
    V::Reg sum[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
    std::size_t j = p / kTriangleTile * kTriangleTile;
    for (std::size_t v = 0; j < n; j += V::kLanes, v = (v + 1) % 4)
      sum[v] = V::fma(V::load(row + j), V::load(x + j), sum[v]);
    const double done = (V::sum(sum[0]) + V::sum(sum[1])) + (V::sum(sum[2]) + V::sum(sum[3]));
    x[p] = (row[column] - done) / row[p];
  }
}

// Cholesky's U with U^T U = A, row by row in place. The right-hand sides are further columns, and so become
// the solution y of U^T y = b.
void solve(double* a, std::size_t n, std::size_t count, std::size_t stride, const double* diagonal,
           double tolerance, double* panel, double* solutions) {
  for (std::size_t first = 0; first < n; first += kTrianglePanel) {
    const std::size_t last = n - first < kTrianglePanel ? n : first + kTrianglePanel;
    eliminate_panel(a, first, last, stride, tolerance, diagonal + first);
    if (last == n) break;
    const std::size_t depth = last - first, size = depth * kTriangleTile;
    pack_panel(a, first, depth, last, stride, panel);
    for (std::size_t j = last; j < stride; j += kTriangleTile) {
      const double* right = panel + (j - last) / kTriangleTile * size;
      for (std::size_t i = last; i < n && i < j + kTriangleTile; i += kTileRows) {
        const double* left = panel + (i - last) / kTriangleTile * size + i % kTriangleTile;
        subtract_tile(a + i * stride + j, stride, left, right, depth);
      }
    }
  }
  for (std::size_t k = 0; k < count; ++k) substitute(a, n, n + k, stride, solutions + k * stride);
}

constexpr ReconstructionKernels kReconstructionKernels = {
    {&propagate_errors<float>, &sweep<float, false>, &sweep<float, true>},
    {&propagate_errors<double>, &sweep<double, false>, &sweep<double, true>},
    &solve};

}  // namespace
}  // namespace sparsam::SPARSAM_TARGET
