// Recurrent layers: the part that must be computed step by step.
#pragma once
#include <cstddef>
#include <string>
#include <vector>

#include "sparsam/forms.hpp"

namespace sparsam {

// One direction of one layer over sequences stored step by step, the longest first, as in torch's
// PackedSequence. A cell computes `gates` vectors of `hidden` numbers; the state h has `width` of them, which
// equals `hidden` unless there is a projection.
struct Recurrence {
  std::string cell;                  // "lstm", "gru", "tanh" or "relu"
  std::vector<std::size_t> batches;  // number of sequences in each step; it never grows
  bool reversed;                     // starts at the last step
  const Form* weight;                // W_hh [gates * hidden x width]
  const Form* projection;            // W_hr [width x hidden], of an LSTM; or null

  std::size_t rows() const;  // of all steps
  std::size_t hidden() const;
  std::size_t width() const { return weight->cols(); }
};

// Throws std::invalid_argument if sizes do not match.
void check(const Recurrence& r);

// inputs: [rows x gates * hidden], W_ih x + b_ih. bias: b_hh, or null. h [batches[0] x width] and, for an
// LSTM, c [batches[0] x hidden] are the states before, and become those after the last step of each sequence.
// y: [rows x width], a row y_stride floats after the other: the state after each step. Nothing overlaps.
void recur(const Recurrence& r, const float* inputs, const float* bias, float* h, float* c, float* y,
           std::size_t y_stride);

}  // namespace sparsam
