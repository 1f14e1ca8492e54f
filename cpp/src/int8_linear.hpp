// Products with int8 and int4 values.
#pragma once
#include "matmul.hpp"
#include "sparsam/forms.hpp"

namespace sparsam {

// For a form of slots, or of int4 values a bitmask; sums are exact, and y is the same on every machine
// (kernels/int8.hpp).
void int8_linear(const Form& form, const Input& x, std::size_t batch, Epilogue epilogue, const Output& y);

}  // namespace sparsam
