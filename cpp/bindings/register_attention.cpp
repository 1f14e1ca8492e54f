#include "arrays.hpp"
#include "sparsam/attention.hpp"

namespace sparsam {
namespace {

using Strides = std::array<std::size_t, 3>;

// Addresses of float32, which the caller guarantees, as attention() takes them; a mask at 0 is none.
void attention_at(const std::array<std::size_t, 5>& shape, std::uintptr_t q, const Strides& of_q,
                  std::uintptr_t k, const Strides& of_k, std::uintptr_t v, const Strides& of_v,
                  std::uintptr_t mask, bool bytes, const Strides& of_mask, float scale, std::uintptr_t out) {
  const auto heads = [](std::uintptr_t at, const Strides& s) {
    return HeadsView{reinterpret_cast<const float*>(at), s[0], s[1], s[2]};
  };
  const MaskView masked{bytes ? reinterpret_cast<const std::uint8_t*>(mask) : nullptr,
                        bytes ? nullptr : reinterpret_cast<const float*>(mask), of_mask[0], of_mask[1],
                        of_mask[2]};
  const Released released;
  attention({shape[0], shape[1], shape[2], shape[3], shape[4]}, heads(q, of_q), heads(k, of_k),
            heads(v, of_v), masked, scale, reinterpret_cast<float*>(out));
}

}  // namespace

void register_attention(py::module_& m) {
  m.def("attention_at", &attention_at, py::arg("shape"), py::arg("q"), py::arg("of_q"), py::arg("k"),
        py::arg("of_k"), py::arg("v"), py::arg("of_v"), py::arg("mask"), py::arg("bytes"), py::arg("of_mask"),
        py::arg("scale"), py::arg("out"));
}

}  // namespace sparsam
