// The Python class of packed matrices, for several register_*.cpp.
#pragma once
#include "arrays.hpp"
#include "sparsam/forms.hpp"

#include <string>
#include <utility>
#include <vector>

namespace sparsam {

using Pair = std::pair<std::size_t, std::size_t>;  // height, width

std::vector<std::string> form_names(const PackedMatrix& w);

// Its methods that multiply.
void add_products(py::class_<PackedMatrix>& packed);

// The form that a kernel of that name reads; a copy, which outlives any keep().
FormPtr form_for(const PackedMatrix& w, const std::string& kernel);

}  // namespace sparsam
