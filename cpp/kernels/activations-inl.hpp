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

// What is left of a distribution beyond a = (i + r) * 5.4 / 14.5, |r| <= 1/2: polynomials in r of degree 4, a
// row of the table for each power, that interpolate it at Chebyshev's points of each piece (piece 0: of r >=
// 0). Errors are at most 1e-7; beyond 5.4 nothing is left.
//
// The standard normal distribution: 1 - Phi(a) = erfc(a / sqrt(2)) / 2.
constexpr float kNormal[5][16] = {
    {0.5f, 0.354792386f, 0.228187978f, 0.131945565f, 0.0681574643f, 0.0312966853f, 0.0127256624f,
     0.00456834817f, 0.00144449004f, 0.000401550002f, 9.79918768e-05f, 2.09674909e-05f, 3.92993979e-06f,
     6.44704869e-07f, 9.25089125e-08f, 0.0f},
    {-0.148571178f, -0.138616934f, -0.112582132f, -0.0795958564f, -0.0489866398f, -0.0262439307f,
     -0.0122388694f, -0.00496834191f, -0.0017556391f, -0.000540017441f, -0.000144585094f, -3.36958365e-05f,
     -6.83531971e-06f, -1.20687832e-06f, -1.85473354e-07f, 0.0f},
    {-6.86966905e-06f, 0.00961246155f, 0.0156140858f, 0.0165587459f, 0.0135879163f, 0.00909946766f,
     0.00509232143f, 0.00241182302f, 0.000974054332f, 0.000337087666f, 0.000100292164f, 2.57148386e-05f,
     5.69182657e-06f, 1.08904464e-06f, 1.80306813e-07f, 0.0f},
    {0.00347283948f, 0.00274466746f, 0.00115875178f, -0.000445084763f, -0.00136720261f, -0.00148913183f,
     -0.00112834678f, -0.000667722838f, -0.000322167791f, -0.000129445587f, -4.38405586e-05f,
     -1.26117575e-05f, -3.09767961e-06f, -6.52017945e-07f, -1.17930938e-07f, 0.0f},
    {-8.85050467e-05f, -0.000315710029f, -0.000438740914f, -0.00033413028f, -0.000123149439f, 4.79870941e-05f,
     0.000116443203f, 0.000105536434f, 6.62348757e-05f, 3.22423184e-05f, 1.27148414e-05f, 4.15197292e-06f,
     1.13716874e-06f, 2.63395293e-07f, 5.1888513e-08f, 0.0f},
};
// Its approximation by tanh: 1 / (1 + e^(2 u)), u = sqrt(2 / pi) (a + 0.044715 a^3).
constexpr float kLogistic[5][16] = {
    {0.5f, 0.354807824f, 0.228278533f, 0.132117033f, 0.0683051646f, 0.031306453f, 0.0125948284f,
     0.00438948767f, 0.00130364648f, 0.000323711836f, 6.58279969e-05f, 1.07284777e-05f, 1.37089955e-06f,
     1.34346365e-07f, 9.87639126e-09f, 0.0f},
    {-0.148571163f, -0.138573706f, -0.112485215f, -0.0795528591f, -0.0490791351f, -0.026405653f,
     -0.0123408213f, -0.00496472139f, -0.00169486867f, -0.000482025178f, -0.000111841393f, -2.07077901e-05f,
     -2.99160865e-06f, -3.29714254e-07f, -2.71051412e-08f, 0.0f},
    {-7.02411262e-06f, 0.00964826439f, 0.0156201227f, 0.016501151f, 0.0135246301f, 0.00909929629f,
     0.0051438068f, 0.0024571945f, 0.000985338585f, 0.000326714478f, 8.78112842e-05f, 1.87161204e-05f,
     3.09351117e-06f, 3.87797257e-07f, 3.60676253e-08f, 0.0f},
    {0.00349070644f, 0.00274707214f, 0.0011387855f, -0.000460440264f, -0.00135487295f, -0.00146560941f,
     -0.00112071435f, -0.000676968193f, -0.000332723866f, -0.00013299135f, -4.26295228e-05f, -1.07482138e-05f,
     -2.08764936e-06f, -3.05930854e-07f, -3.31358372e-08f, 0.0f},
    {-9.05089109e-05f, -0.000321887695f, -0.000442061602f, -0.000328657945f, -0.000116712348f,
     4.67162026e-05f, 0.000111058042f, 0.000103179496f, 6.75313568e-05f, 3.3987184e-05f, 1.33073609e-05f,
     4.01195348e-06f, 9.15855765e-07f, 1.55434321e-07f, 1.92488105e-08f, 0.0f},
};
constexpr float kPieces = 2.6851852f;  // 14.5 / 5.4

// x times a distribution function of x, whose rest beyond |x| is `rest`: max(x, 0) - |x| rest(|x|). |x| ends
// at 16 for positive x, so that infinity times 0 is not NaN there: it is for -infinity, as in torch. Adding
// 1.5 * 2^23 leaves the number of the piece in the lowest bits.
template <class F = Floats>
inline Floats::Reg by_distribution(Floats::Reg x, const float (&rest)[5][16]) {
  const Floats::Reg a = F::max(F::min(x, F::set1(16.0f)), F::sub(F::zero(), x)), far = F::set1(12582912.0f);
  const Floats::Reg t = F::min(F::mul(a, F::set1(kPieces)), F::set1(15.0f));
  const Floats::Reg piece = F::add(t, far), r = F::sub(t, F::sub(piece, far));
  Floats::Reg p = F::lookup(rest[4], piece);
  for (int power = 3; power >= 0; --power) p = F::fma(p, r, F::lookup(rest[power], piece));
  return F::sub(F::max(F::zero(), x), F::mul(a, p));
}

template <class F = Floats>
inline Floats::Reg sigmoid(Floats::Reg x) {
  const Floats::Reg one = F::set1(1.0f);
  return F::div(one, F::add(one, exponential<F>(F::sub(F::zero(), x))));
}

// Below -88 the computed sigmoid is nearly 0 but no longer decreases, so its factor must not grow. At
// -infinity it is 0 and the product is NaN, which 0 * x gives.
template <class F = Floats>
inline Floats::Reg silu(Floats::Reg x) {
  const Floats::Reg product = F::mul(F::max(F::set1(-88.0f), x), sigmoid<F>(x));
  return F::fma(F::zero(), F::min(F::zero(), x), product);
}

// Infinities and NaN give what torch gives. NaN stays NaN: every branch multiplies by x or passes it through
// max or min as the second operand.
template <class F = Floats>
inline Floats::Reg activate(Floats::Reg x, Activation activation) {
  switch (activation) {
    case Activation::relu:
      return F::max(F::zero(), x);
    case Activation::gelu:
      return by_distribution<F>(x, kNormal);
    case Activation::gelu_tanh:  // 0.5 x (1 + tanh u) = x / (1 + e^(-2 u))
      return by_distribution<F>(x, kLogistic);
    case Activation::silu:
      return silu<F>(x);
    default:
      return x;
  }
}

}  // namespace
}  // namespace sparsam::SPARSAM_TARGET
