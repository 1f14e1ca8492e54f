// Activations over Floats, accurate to a few units in the last place of the larger of argument and result. F
// is Floats, or a class that replaces its operations.
#pragma once
#include "matmul.hpp"

namespace sparsam::SPARSAM_TARGET {
namespace {

// e^x, clamped to the range of normal numbers. x = n ln 2 + r with |r| <= ln(2)/2; e^r by its Taylor
// polynomial of degree 7, whose remainder there is below 1e-8.
template <class F = Floats>
inline Floats::Reg exponential(Floats::Reg x) {
  x = F::min(F::set1(88.0f), F::max(F::set1(-87.0f), x));
  const Floats::Reg n = F::round(F::mul(x, F::set1(1.442695041f)));
  Floats::Reg r = F::fma(n, F::set1(-0.693359375f), x);  // ln 2 in two parts, the first exact in a product
  r = F::fma(n, F::set1(2.12194440e-4f), r);
  Floats::Reg p = F::set1(1.0f / 5040);
  constexpr float kTaylor[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  for (const float c : kTaylor) p = F::fma(p, r, F::set1(c));
  return F::scale(p, n);
}

// Abramowitz and Stegun 7.1.26: absolute error at most 1.5e-7.
template <class F = Floats>
inline Floats::Reg error_function(Floats::Reg x) {
  const Floats::Reg a = F::abs(x), one = F::set1(1.0f);
  const Floats::Reg t = F::div(one, F::fma(F::set1(0.3275911f), a, one));
  Floats::Reg p = F::set1(1.061405429f);
  constexpr float kTerms[] = {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f};
  for (const float c : kTerms) p = F::fma(p, t, F::set1(c));
  const Floats::Reg tail = F::mul(F::mul(p, t), exponential<F>(F::sub(F::zero(), F::mul(a, a))));
  return F::copysign(F::sub(one, tail), x);
}

template <class F = Floats>
inline Floats::Reg sigmoid(Floats::Reg x) {
  const Floats::Reg one = F::set1(1.0f);
  return F::div(one, F::add(one, exponential<F>(F::sub(F::zero(), x))));
}

// x sigmoid(u), with u growing as x does. Below -88 the computed sigmoid is nearly 0 but no longer decreases,
// so its factor must not grow. At -infinity it is 0 and the product is NaN, which 0 * x gives.
template <class F = Floats>
inline Floats::Reg gated(Floats::Reg x, Floats::Reg u) {
  const Floats::Reg product = F::mul(F::max(F::set1(-88.0f), x), sigmoid<F>(u));
  return F::fma(F::zero(), F::min(F::zero(), x), product);
}

// Infinities and NaN give what torch gives. NaN stays NaN: every branch multiplies by x or passes it through
// max or min as the second operand.
template <class F = Floats>
inline Floats::Reg activate(Floats::Reg x, Activation activation) {
  switch (activation) {
    case Activation::relu:
      return F::max(F::zero(), x);
    case Activation::gelu: {
      const Floats::Reg half = F::mul(F::set1(0.5f), x);
      return F::fma(half, error_function<F>(F::mul(x, F::set1(0.7071067812f))), half);
    }
    case Activation::gelu_tanh: {
      // 0.5 x (1 + tanh u) = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
      const Floats::Reg cubic = F::mul(F::mul(F::set1(0.044715f), x), x);
      const Floats::Reg u = F::mul(F::set1(1.5957691216f), F::fma(cubic, x, x));
      return gated<F>(x, u);
    }
    case Activation::silu:
      return gated<F>(x, x);
    default:
      return x;
  }
}

}  // namespace
}  // namespace sparsam::SPARSAM_TARGET
