#include "arrays.hpp"
#include "packed.hpp"
#include "sparsam/recurrent.hpp"

namespace sparsam {
namespace {

// Addresses of contiguous float32, which the caller guarantees, sized as recur() requires; 0 is null.
void recur_at(const PackedMatrix& weight, const std::string& kernel, const PackedMatrix* projection,
              const std::string& projection_kernel, const std::string& cell, std::vector<std::size_t> batches,
              bool reversed, std::uintptr_t inputs, std::uintptr_t bias, std::uintptr_t h, std::uintptr_t c,
              std::uintptr_t y, std::size_t y_stride) {
  const FormPtr form = form_for(weight, kernel);
  const FormPtr projected = projection != nullptr ? form_for(*projection, projection_kernel) : nullptr;
  const Recurrence r{cell, std::move(batches), reversed, form.get(), projected.get()};
  check(r);
  const Released released;
  recur(r, reinterpret_cast<const float*>(inputs), reinterpret_cast<const float*>(bias),
        reinterpret_cast<float*>(h), reinterpret_cast<float*>(c), reinterpret_cast<float*>(y), y_stride);
}

}  // namespace

void register_recurrent(py::module_& m) {
  m.def("recur_at", &recur_at, py::arg("weight"), py::arg("kernel"), py::arg("projection").none(true),
        py::arg("projection_kernel"), py::arg("cell"), py::arg("batches"), py::arg("reversed"),
        py::arg("inputs"), py::arg("bias"), py::arg("h"), py::arg("c"), py::arg("y"), py::arg("y_stride"));
}

}  // namespace sparsam
