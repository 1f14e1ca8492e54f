// The Python class of packed matrices, for several register_*.cpp. Include after arrays.hpp.
#pragma once
#include <string>

#include "sparsam/forms.hpp"

namespace sparsam {

// The form that a kernel of that name reads; a copy, which outlives any keep().
FormPtr form_for(const PackedMatrix& w, const std::string& kernel);

}  // namespace sparsam
