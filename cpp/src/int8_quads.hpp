// Products of many rows of x with int8 values of which few slots are used: by quads instead.
#pragma once
#include "int8.hpp"
#include "sparsam/forms.hpp"

namespace sparsam {

class Int8Quads {
 public:
  // For a form in slots. What is multiplied how depends on the form and the batch alone.
  Int8Quads(const Form& form, const Int8Kernels& kernel, std::size_t batch);

  // The first rows of x, 0 for none, are multiplied by quads.
  std::size_t rows() const { return rows_; }
  std::size_t bytes() const;  // of memory, at a multiple of 64

  // As slots do it, to the last bit.
  void multiply(const std::uint8_t* x, std::size_t x_stride, const float* x_scale, std::uint8_t* memory,
                const Epilogue& epilogue, const Output& y) const;

 private:
  Int8View w_;
  const Int8Kernels& kernel_;
  std::size_t rows_ = 0, tiles_ = 0, groups_, step_ = 1, blocks_ = 0, workers_ = 1, room_ = 0;
};

}  // namespace sparsam
