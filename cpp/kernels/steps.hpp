// Arguments of the kernels of row-wise steps, and the table of these kernels. Plain data; no STL.
#pragma once
#include <cstddef>

#include "matmul.hpp"

namespace sparsam {

// Rows of a norm, contiguous: x = a + b is normalised to y.
struct NormRows {
  std::size_t rows, width;     // width is not 0
  const float *a, *b;          // b may be null
  float* sum;                  // gets x where b is given; may be a or b, and null where nobody reads it
  float* y;                    // may be a or b, not sum
  const float *weight, *bias;  // null for 1 and 0
  float eps;
};

// Rows of heads, each turned by the angles of its row: y = x cos + rotate_half(x) sin, where rotate_half is
// (-second half, first half).
struct RotaryRows {
  std::size_t rows, heads, depth;  // depth is even
  const float *x, *cos, *sin;      // [rows x heads x depth]; [rows x depth] each
  float* y;                        // may be x
};

// What is computed of a number or a row does not depend on where it stands.
struct StepKernels {
  // weight (x - mean) / sqrt(variance + eps) + bias. A row that is not finite becomes NaN.
  void (*layer_norm)(const NormRows& rows);
  // weight x / sqrt(mean of squares + eps), without a bias
  void (*rms_norm)(const NormRows& rows);
  // Of n numbers; y may be an operand.
  void (*add)(const float* a, const float* b, std::size_t n, float* y);
  void (*activate)(const float* x, std::size_t n, Activation activation, float* y);
  void (*gate)(const float* g, const float* u, std::size_t n, Activation activation, float* y);
  void (*rotary)(const RotaryRows& rows);
};

}  // namespace sparsam
