// Which registers hold numbers of a type. Include after a floats_*.hpp.
#pragma once

namespace sparsam::SPARSAM_TARGET {
namespace {

template <class T>
struct LanesOf;
template <>
struct LanesOf<float> {
  using type = Floats;
};
template <>
struct LanesOf<double> {
  using type = Doubles;
};

}  // namespace
}  // namespace sparsam::SPARSAM_TARGET
