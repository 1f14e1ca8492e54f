#include "sparsam/reconstruction.hpp"

#include <algorithm>
#include <cstring>
#include <vector>

#include "reconstruction.hpp"
#include "sparsam/isa.hpp"
#include "sparsam/memory.hpp"
#include "sparsam/threads.hpp"
#include "table.hpp"

namespace sparsam {
namespace {

static_assert(kSweepColumns == kMaxSweepColumns);

std::size_t round_up(std::size_t n, std::size_t to) { return (n + to - 1) / to * to; }

template <class T>
const SweepKernels<T>& sweep_kernels() {
  if constexpr (sizeof(T) == sizeof(float))
    return kernels().reconstruction.f32;
  else
    return kernels().reconstruction.f64;
}

// A block of a matrix, without the settings of the sweep.
template <class T>
SweepBlock<T> block_of(const Sweep<T>& matrix, std::size_t first, std::size_t cols) {
  return {matrix.w + first,
          matrix.keep + first,
          matrix.errors + first,
          matrix.stride,
          first,
          cols,
          nullptr,
          round_up(cols, kSweepTile),
          nullptr,
          0,
          0,
          nullptr,
          0,
          1,
          0};
}

template <class T>
void for_each_rows(std::size_t rows, std::size_t row_work,
                   void (*kernel)(const SweepBlock<T>&, std::size_t, std::size_t),
                   const SweepBlock<T>& block) {
  // Rows take about equal time: a few more tasks than threads are enough to balance a thread that is
  // disturbed.
  constexpr std::size_t kRows = 8 * kSweepRows;
  const std::size_t tasks = (rows + kRows - 1) / kRows;
  const std::size_t workers = worker_count(tasks, rows * row_work >= std::size_t{1} << 19);
  for_each_task(tasks, workers, [&](std::size_t, std::size_t task) {
    kernel(block, task * kRows, std::min(rows, (task + 1) * kRows));
  });
}

// The triangle of a block, packed.
template <class T>
std::vector<T> triangle_of(const Sweep<T>& matrix, const SweepBlock<T>& block) {
  std::vector<T> triangle(block.cols * block.u_stride);
  for (std::size_t j = 0; j < block.cols; ++j)
    std::memcpy(triangle.data() + j * block.u_stride,
                matrix.u + (block.first + j) * block.stride + block.first, block.cols * sizeof(T));
  return triangle;
}

}  // namespace

template <class T>
void Sweep<T>::propagate_errors(std::size_t first, std::size_t cols) const {
  SweepBlock<T> block = block_of(*this, first, cols);
  std::vector<T> panel(first * block.u_stride);
  for (std::size_t tile = 0; tile < cols; tile += kSweepTile)
    for (std::size_t p = 0; p < first; ++p)
      std::memcpy(panel.data() + tile * first + p * kSweepTile, u + p * stride + first + tile,
                  std::min(kSweepTile, cols - tile) * sizeof(T));
  block.panel = panel.data();
  for_each_rows(rows, cols * first, sweep_kernels<T>().propagate_errors, block);
}

template <class T>
void Sweep<T>::sweep(std::size_t first, std::size_t cols, std::size_t n, std::size_t m) const {
  SweepBlock<T> block = block_of(*this, first, cols);
  const std::vector<T> triangle = triangle_of(*this, block);
  block.u = triangle.data();
  block.n = n;
  block.m = m;
  for_each_rows(rows, cols * cols, sweep_kernels<T>().sweep, block);
}

template <class T>
void Sweep<T>::rounding_sweep(std::size_t first, std::size_t cols, const Grid<T>& grid) const {
  SweepBlock<T> block = block_of(*this, first, cols);
  const std::vector<T> triangle = triangle_of(*this, block);
  block.u = triangle.data();
  block.scales = grid.scales;
  block.groups = grid.groups;
  block.group = grid.group;
  block.most = grid.most;
  for_each_rows(rows, cols * cols, sweep_kernels<T>().rounding_sweep, block);
}

template struct Sweep<float>;
template struct Sweep<double>;

namespace {

// Memory for one group: its support, the triangle with the right-hand sides beside it, and scratch.
struct GroupSize {
  std::size_t n, count, stride;

  std::size_t triangle() const { return round_up(n, kTriangleTile) * stride; }
  std::size_t panel() const { return kTrianglePanel * stride; }
  std::size_t solutions() const { return count * stride; }
  std::size_t numbers() const { return triangle() + panel() + solutions() + n; }
};

void solve_group(const SupportSystems& systems, const GroupSize& size, const std::int64_t* rows,
                 const ReconstructionKernels& table, std::int64_t* support, double* memory) {
  const std::uint8_t* keep = systems.keep + static_cast<std::size_t>(rows[0]) * systems.cols;
  for (std::size_t j = 0, i = 0; j < systems.cols; ++j)
    if (keep[j] != 0) support[i++] = static_cast<std::int64_t>(j);
  double* a = memory;
  double* panel = a + size.triangle();
  double* solutions = panel + size.panel();
  double* diagonal = solutions + size.solutions();
  std::memset(a, 0, size.triangle() * sizeof(double));
  for (std::size_t i = 0; i < size.n; ++i) {
    const double* from = systems.h + static_cast<std::size_t>(support[i]) * systems.cols;
    double* to = a + i * size.stride;
    for (std::size_t j = i; j < size.n; ++j) to[j] = from[support[j]];
    for (std::size_t k = 0; k < size.count; ++k)
      to[size.n + k] =
          systems
              .sides[static_cast<std::size_t>(rows[k]) * systems.cols + static_cast<std::size_t>(support[i])];
    diagonal[i] = to[i];
  }
  table.solve(a, size.n, size.count, size.stride, diagonal, systems.tolerance, panel, solutions);
  for (std::size_t k = 0; k < size.count; ++k) {
    double* x = systems.sides + static_cast<std::size_t>(rows[k]) * systems.cols;
    std::memset(x, 0, systems.cols * sizeof(double));
    for (std::size_t i = 0; i < size.n; ++i) x[support[i]] = solutions[k * size.stride + i];
  }
}

}  // namespace

void SupportSystems::solve() const {
  std::vector<GroupSize> sizes(groups);
  std::size_t most = 0, work = 0;
  for (std::size_t g = 0; g < groups; ++g) {
    const std::uint8_t* row = keep + static_cast<std::size_t>(order[starts[g]]) * cols;
    const auto n = static_cast<std::size_t>(std::count_if(row, row + cols, [](auto k) { return k != 0; }));
    const auto count = static_cast<std::size_t>(starts[g + 1] - starts[g]);
    sizes[g] = {n, count, round_up(n + count, kTriangleTile)};
    most = std::max(most, sizes[g].numbers());
    work += n * n * (n / 6 + count);
  }
  const std::size_t workers = worker_count(groups, work >= std::size_t{1} << 19);
  std::vector<Memory> memory;
  std::vector<std::vector<std::int64_t>> supports(workers, std::vector<std::int64_t>(cols));
  for (std::size_t i = 0; i < workers; ++i) memory.emplace_back(most * sizeof(double));
  const ReconstructionKernels& table = kernels().reconstruction;
  for_each_task(groups, workers, [&](std::size_t worker, std::size_t g) {
    solve_group(*this, sizes[g], order + starts[g], table, supports[worker].data(),
                memory[worker].as<double>());
  });
}

}  // namespace sparsam
