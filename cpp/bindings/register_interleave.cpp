#include "arrays.hpp"
#include "sparsam/interleave.hpp"

namespace sparsam {
namespace {

// Addresses of contiguous float32, which the caller guarantees.
void interleave_at(std::uintptr_t x, std::size_t planes, const Sizes3& stride, const Sizes3& inner,
                   const Sizes3& offset, const Sizes3& outer, std::uintptr_t y) {
  const Interleaving g{planes, stride, inner, offset, outer};
  check(g);
  const Released released;
  interleave(g, reinterpret_cast<const float*>(x), reinterpret_cast<float*>(y));
}

}  // namespace

void register_interleave(py::module_& m) {
  m.def("interleave_at", &interleave_at, py::arg("x"), py::arg("planes"), py::arg("stride"), py::arg("inner"),
        py::arg("offset"), py::arg("outer"), py::arg("y"));
}

}  // namespace sparsam
