#include "sparsam/recurrent.hpp"

#include <algorithm>
#include <iterator>
#include <numeric>
#include <stdexcept>

#include "chunks.hpp"
#include "recurrent.hpp"
#include "sparsam/errors.hpp"
#include "sparsam/isa.hpp"
#include "sparsam/matmul.hpp"
#include "sparsam/memory.hpp"
#include "sparsam/threads.hpp"
#include "table.hpp"

namespace sparsam {
namespace {

constexpr std::size_t kCellCost = 16;  // multiplications that cost as much as one number of a cell

Cell cell_of(const std::string& name) {
  constexpr const char* kNames[] = {"lstm", "gru", "tanh", "relu"};
  static_assert(std::size(kNames) == kCells);
  for (std::size_t i = 0; i < kCells; ++i)
    if (name == kNames[i]) return static_cast<Cell>(i);
  throw std::invalid_argument(expected("cell", quoted(name), "lstm, gru, tanh or relu", "pass one of them"));
}

}  // namespace

std::size_t Recurrence::rows() const {
  return std::accumulate(batches.begin(), batches.end(), std::size_t{0});
}

std::size_t Recurrence::hidden() const { return weight->rows() / gates_of(cell_of(cell)); }

void check(const Recurrence& r) {
  const std::size_t gates = gates_of(cell_of(r.cell));
  if (!std::is_sorted(r.batches.rbegin(), r.batches.rend()))
    throw std::invalid_argument(
        expected("batches", "one", "no step with more sequences than the one before", "sort by length"));
  const bool projected = r.projection != nullptr;
  const bool fits =
      projected ? r.cell == "lstm" && r.projection->rows() == r.width() && r.projection->cols() == r.hidden()
                : r.width() == r.hidden();
  if (r.weight->rows() % gates != 0 || !fits)
    throw std::invalid_argument(
        expected("weights", std::to_string(r.weight->rows()) + " x " + std::to_string(r.weight->cols()),
                 "those of one layer with " + std::to_string(gates) + " gates",
                 "pass W_hh, and W_hr where there is one"));
}

void recur(const Recurrence& r, const float* inputs, const float* bias, float* h, float* c, float* y,
           std::size_t y_stride) {
  if (r.batches.empty() || r.batches.front() == 0) return;
  const Cell cell = cell_of(r.cell);
  const std::size_t hidden = r.hidden(), gates = r.weight->rows(), width = r.width(),
                    most = r.batches.front();
  const auto step = kernels().recurrent.step[static_cast<std::size_t>(cell)];
  const Memory memory((gates + (r.projection != nullptr ? hidden : 0)) * most * sizeof(float));
  float* const sums = memory.as<float>();
  float* const out = r.projection != nullptr ? sums + gates * most : h;
  std::size_t row = r.reversed ? r.rows() : 0;  // the first of the step, or of the one after it
  for (std::size_t i = 0; i < r.batches.size(); ++i) {
    const std::size_t n = r.batches[r.reversed ? r.batches.size() - 1 - i : i];
    if (r.reversed) row -= n;
    linear(*r.weight, h, n, bias, "", sums);
    for_each_task(n, worker_count(n, n * hidden * kCellCost >= kSerialBelow),
                  [&](std::size_t, std::size_t b) {
                    step({hidden, inputs + (row + b) * gates, sums + b * gates,
                          c == nullptr ? nullptr : c + b * hidden, h + b * width, out + b * hidden});
                  });
    if (r.projection != nullptr) linear(*r.projection, out, n, nullptr, "", h);
    for (std::size_t b = 0; b < n; ++b) std::copy_n(h + b * width, width, y + (row + b) * y_stride);
    if (!r.reversed) row += n;
  }
}

}  // namespace sparsam
