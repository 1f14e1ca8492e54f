// Activations over Floats, accurate to a few units in the last place of the larger of argument and result.
#pragma once
#include "matmul.hpp"

namespace sparsam::SPARSAM_TARGET {
namespace {

// e^x, clamped to the range of normal numbers. x = n ln 2 + r with |r| <= ln(2)/2; e^r by its Taylor
// polynomial of degree 7, whose remainder there is below 1e-8.
inline Floats::Reg exponential(Floats::Reg x) {
  x = Floats::min(Floats::set1(88.0f), Floats::max(Floats::set1(-87.0f), x));
  const Floats::Reg n = Floats::round(Floats::mul(x, Floats::set1(1.442695041f)));
  Floats::Reg r =
      Floats::fma(n, Floats::set1(-0.693359375f), x);  // ln 2 in two parts, the first exact in a product
  r = Floats::fma(n, Floats::set1(2.12194440e-4f), r);
  Floats::Reg p = Floats::set1(1.0f / 5040);
  constexpr float kTaylor[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  for (const float c : kTaylor) p = Floats::fma(p, r, Floats::set1(c));
  return Floats::scale(p, n);
}

// Abramowitz and Stegun 7.1.26: absolute error at most 1.5e-7.
inline Floats::Reg error_function(Floats::Reg x) {
  const Floats::Reg a = Floats::abs(x), one = Floats::set1(1.0f);
  const Floats::Reg t = Floats::div(one, Floats::fma(Floats::set1(0.3275911f), a, one));
  Floats::Reg p = Floats::set1(1.061405429f);
  constexpr float kTerms[] = {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f};
  for (const float c : kTerms) p = Floats::fma(p, t, Floats::set1(c));
  const Floats::Reg tail =
      Floats::mul(Floats::mul(p, t), exponential(Floats::sub(Floats::zero(), Floats::mul(a, a))));
  return Floats::copysign(Floats::sub(one, tail), x);
}

inline Floats::Reg sigmoid(Floats::Reg x) {
  const Floats::Reg one = Floats::set1(1.0f);
  return Floats::div(one, Floats::add(one, exponential(Floats::sub(Floats::zero(), x))));
}

// x sigmoid(u), with u growing as x does. Below -88 a sigmoid is as good as 0 but does not shrink further, so
// what it is multiplied with must not grow. At -infinity it is 0, and the product not a number: 0 * x says
// so.
inline Floats::Reg gated(Floats::Reg x, Floats::Reg u) {
  const Floats::Reg product = Floats::mul(Floats::max(Floats::set1(-88.0f), x), sigmoid(u));
  return Floats::fma(Floats::zero(), Floats::min(Floats::zero(), x), product);
}

// As torch has it for infinities and NaN. NaN stays NaN: every branch multiplies by x or passes it through
// max or min as the second operand.
inline Floats::Reg activate(Floats::Reg x, Activation activation) {
  switch (activation) {
    case Activation::relu:
      return Floats::max(Floats::zero(), x);
    case Activation::gelu: {
      const Floats::Reg half = Floats::mul(Floats::set1(0.5f), x);
      return Floats::fma(half, error_function(Floats::mul(x, Floats::set1(0.7071067812f))), half);
    }
    case Activation::gelu_tanh: {
      // 0.5 x (1 + tanh u) = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
      const Floats::Reg cubic = Floats::mul(Floats::mul(Floats::set1(0.044715f), x), x);
      const Floats::Reg u = Floats::mul(Floats::set1(1.5957691216f), Floats::fma(cubic, x, x));
      return gated(x, u);
    }
    case Activation::silu:
      return gated(x, x);
    default:
      return x;
  }
}

}  // namespace
}  // namespace sparsam::SPARSAM_TARGET
