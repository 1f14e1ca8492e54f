// Arguments of the kernels of recurrent cells, and the table of these kernels. Plain data; no STL.
#pragma once
#include <cstddef>
#include <cstdint>

namespace sparsam {

enum class Cell : std::uint8_t { lstm, gru, tanh, relu };
constexpr std::size_t kCells = 4;

// How many vectors of `hidden` numbers a cell computes from its input and its state.
constexpr std::size_t gates_of(Cell cell) { return cell == Cell::lstm ? 4 : cell == Cell::gru ? 3 : 1; }

// One step of one sequence. Gates are stored one after another, each of `hidden` numbers, in PyTorch's order.
struct CellStep {
  std::size_t hidden;
  const float* input;   // W_ih x + b_ih
  const float* state;   // W_hh h + b_hh
  float* cell;          // of an LSTM: c, which becomes the next
  const float* before;  // of a GRU: h
  float* out;           // the next h; may be `before`
};

struct RecurrentKernels {
  void (*step[kCells])(const CellStep& s);  // by Cell
};

}  // namespace sparsam
