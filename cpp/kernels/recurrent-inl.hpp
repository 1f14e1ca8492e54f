// Cells of recurrent layers, written once over Floats. The formulas are those of PyTorch's documentation
// (LSTM: Hochreiter and Schmidhuber 1997; GRU: Cho et al. 2014). Include after activations-inl.hpp.
#pragma once
#include "activations-inl.hpp"
#include "recurrent.hpp"

namespace sparsam::SPARSAM_TARGET {
namespace {

// (1 - e^-2|x|) / (1 + e^-2|x|) with the sign of x: absolute error of a few units in the last place of 1.
inline Floats::Reg hyperbolic_tangent(Floats::Reg x) {
  const Floats::Reg one = Floats::set1(1.0f),
                    e = exponential(Floats::mul(Floats::set1(-2.0f), Floats::abs(x)));
  return Floats::copysign(Floats::div(Floats::sub(one, e), Floats::add(one, e)), x);
}

// A vector of lanes of gates; the last one may be partial.
struct Lanes {
  std::size_t at, n;
  Floats::Reg load(const float* p) const { return Floats::load_partial(p + at, n); }
  Floats::Reg sum(const CellStep& s, std::size_t gate) const {
    return Floats::add(load(s.input + gate * s.hidden), load(s.state + gate * s.hidden));
  }
  void store(float* p, Floats::Reg r) const { Floats::store_partial(p + at, r, n); }
};

template <class Body>
inline void for_lanes(std::size_t hidden, Body body) {
  for (std::size_t at = 0; at < hidden; at += Floats::kLanes)
    body(Lanes{at, hidden - at < Floats::kLanes ? hidden - at : Floats::kLanes});
}

// c' = sigmoid(f) c + sigmoid(i) tanh(g), h' = sigmoid(o) tanh(c')
inline void lstm_step(const CellStep& s) {
  for_lanes(s.hidden, [&](Lanes lanes) {
    const Floats::Reg added = Floats::mul(sigmoid(lanes.sum(s, 0)), hyperbolic_tangent(lanes.sum(s, 2)));
    const Floats::Reg cell = Floats::fma(sigmoid(lanes.sum(s, 1)), lanes.load(s.cell), added);
    lanes.store(s.cell, cell);
    lanes.store(s.out, Floats::mul(sigmoid(lanes.sum(s, 3)), hyperbolic_tangent(cell)));
  });
}

// n = tanh(in_n + sigmoid(r) state_n), h' = n + sigmoid(z) (h - n)
inline void gru_step(const CellStep& s) {
  for_lanes(s.hidden, [&](Lanes lanes) {
    const Floats::Reg reset = sigmoid(lanes.sum(s, 0)), update = sigmoid(lanes.sum(s, 1));
    const Floats::Reg fresh = hyperbolic_tangent(
        Floats::fma(reset, lanes.load(s.state + 2 * s.hidden), lanes.load(s.input + 2 * s.hidden)));
    lanes.store(s.out, Floats::fma(update, Floats::sub(lanes.load(s.before), fresh), fresh));
  });
}

inline void tanh_step(const CellStep& s) {
  for_lanes(s.hidden, [&](Lanes lanes) { lanes.store(s.out, hyperbolic_tangent(lanes.sum(s, 0))); });
}

inline void relu_step(const CellStep& s) {
  for_lanes(s.hidden, [&](Lanes lanes) { lanes.store(s.out, activate(lanes.sum(s, 0), Activation::relu)); });
}

constexpr RecurrentKernels kRecurrentKernels = {{&lstm_step, &gru_step, &tanh_step, &relu_step}};

}  // namespace
}  // namespace sparsam::SPARSAM_TARGET
