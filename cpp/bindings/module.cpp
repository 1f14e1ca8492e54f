#include "arrays.hpp"

PYBIND11_MODULE(_core, m) {
  m.doc() = "The C++ core of sparsam; its public face is the Python package around it.";
  sparsam::register_runtime(m);
  sparsam::register_selection(m);
  sparsam::register_masks(m);
  sparsam::register_packed(m);
  sparsam::register_moments(m);
  sparsam::register_reconstruction(m);
  sparsam::register_recurrent(m);
  sparsam::register_attention(m);
  sparsam::register_interleave(m);
  sparsam::register_steps(m);
  sparsam::register_tensors(m);
  sparsam::register_guards(m);
}
