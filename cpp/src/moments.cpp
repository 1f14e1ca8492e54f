#include "sparsam/moments.hpp"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "moments.hpp"
#include "sparsam/isa.hpp"
#include "sparsam/memory.hpp"
#include "sparsam/threads.hpp"
#include "table.hpp"

namespace sparsam {
namespace {

std::size_t ceil_div(std::size_t n, std::size_t by) { return (n + by - 1) / by; }

template <class T>
AddProducts<T> kernel_of() {
  if constexpr (sizeof(T) == sizeof(float))
    return kernels().moments.f32;
  else
    return kernels().moments.f64;
}

// The columns of a matrix in panels: [run of kMomentRows rows][panel][row][column], zeros past the columns.
template <class T>
class PackedColumns {
 public:
  explicit PackedColumns(const ScaledMatrix<T>& matrix)
      : matrix_(matrix),
        panels_(ceil_div(matrix.cols, kMomentPanel)),
        scale_(panels_ * kMomentPanel, 1.0),
        memory_(matrix.rows * panels_ * kMomentPanel * sizeof(T)) {
    std::copy_n(matrix.scale, matrix.cols, scale_.begin());
  }

  std::size_t panels() const { return panels_; }
  std::size_t runs() const { return ceil_div(matrix_.rows, kMomentRows); }
  std::size_t rows(std::size_t run) const { return std::min(kMomentRows, matrix_.rows - run * kMomentRows); }
  const double* scale(std::size_t panel) const { return scale_.data() + panel * kMomentPanel; }
  T* panel(std::size_t run, std::size_t panel) const {
    return memory_.template as<T>() + (run * kMomentRows * panels_ + panel * rows(run)) * kMomentPanel;
  }

  void pack(std::size_t run) const {
    for (std::size_t r = 0; r < rows(run); ++r) {
      const T* from = matrix_.data + (run * kMomentRows + r) * matrix_.cols;
      for (std::size_t p = 0; p < panels_; ++p) {
        T* to = panel(run, p) + r * kMomentPanel;
        const std::size_t n = std::min(kMomentPanel, matrix_.cols - p * kMomentPanel);
        std::memcpy(to, from + p * kMomentPanel, n * sizeof(T));
        std::fill(to + n, to + kMomentPanel, T{0});
      }
    }
  }

 private:
  ScaledMatrix<T> matrix_;
  std::size_t panels_;
  std::vector<double> scale_;
  Memory memory_;
};

// A tile: its position in the matrix, counted in tiles, and in memory.
struct Tile {
  std::size_t down, across, index;
};

std::vector<Tile> tiles_of(std::size_t a_cols, std::size_t b_cols, std::size_t edge_a, std::size_t edge_b,
                           bool upper) {
  std::vector<Tile> tiles;
  const std::size_t down = ceil_div(a_cols, edge_a), across = ceil_div(b_cols, edge_b);
  for (std::size_t i = 0; i < down; ++i)
    for (std::size_t j = upper ? i : 0; j < across; ++j) tiles.push_back({i, j, tiles.size()});
  return tiles;
}

// Tiles are taken square by square, so that their panels stay in the cache.
void order_by_squares(std::vector<Tile>& tiles) {
  constexpr std::size_t kSquare = 8;
  std::stable_sort(tiles.begin(), tiles.end(), [](const Tile& a, const Tile& b) {
    return std::make_pair(a.down / kSquare, a.across / kSquare) <
           std::make_pair(b.down / kSquare, b.across / kSquare);
  });
}

}  // namespace

std::size_t moment_numbers(std::size_t a_cols, std::size_t b_cols, std::size_t edge_a, std::size_t edge_b,
                           bool upper) {
  return tiles_of(a_cols, b_cols, edge_a, edge_b, upper).size() * edge_a * edge_b;
}

template <class T>
void add_products(const ScaledMatrix<T>& a, const ScaledMatrix<T>& b, std::size_t edge_a, std::size_t edge_b,
                  bool upper, double* tiles) {
  std::vector<Tile> order = tiles_of(a.cols, b.cols, edge_a, edge_b, upper);
  order_by_squares(order);
  const PackedColumns<T> left(a);
  // If both factors are the same matrix, as for second moments, it is packed once.
  const PackedColumns<T> other(a.data == b.data ? ScaledMatrix<T>{b.data, 0, 0, b.scale} : b);
  const PackedColumns<T>& right = a.data == b.data ? left : other;
  const bool parallel = a.rows * a.cols * b.cols >= std::size_t{1} << 20;
  const std::size_t runs = left.runs();
  for_each_task(runs, worker_count(runs, parallel), Interrupts::held, [&](std::size_t, std::size_t run) {
    left.pack(run);
    if (&right != &left) right.pack(run);
  });
  const AddProducts<T> add = kernel_of<T>();
  const std::size_t high = edge_a / kMomentPanel, wide = edge_b / kMomentPanel;
  for_each_task(order.size(), worker_count(order.size(), parallel), Interrupts::held,
                [&](std::size_t, std::size_t task) {
                  double* tile = tiles + order[task].index * edge_a * edge_b;
                  const std::size_t top = order[task].down * high, first = order[task].across * wide;
                  const std::size_t bottom = std::min(top + high, left.panels());
                  const std::size_t last = std::min(first + wide, right.panels());
                  for (std::size_t run = 0; run < runs; ++run)
                    for (std::size_t j = first; j < last; ++j)
                      for (std::size_t i = top; i < (upper ? std::min(bottom, j + 1) : bottom); ++i)
                        add(left.panel(run, i), right.panel(run, j), left.rows(run), left.scale(i),
                            right.scale(j), tile + ((i - top) * edge_b + (j - first)) * kMomentPanel, edge_b);
                });
}

template void add_products(const ScaledMatrix<float>&, const ScaledMatrix<float>&, std::size_t, std::size_t,
                           bool, double*);
template void add_products(const ScaledMatrix<double>&, const ScaledMatrix<double>&, std::size_t, std::size_t,
                           bool, double*);

}  // namespace sparsam
