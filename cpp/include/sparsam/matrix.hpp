// A packed sparse matrix: the canonical bitmask form, the panels derived from it, and products with either.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "sparsam/memory.hpp"
#include "sparsam/views.hpp"

namespace sparsam {

struct BitmaskView;
struct Panels;
struct PanelView;

enum class ProductKernel : std::uint8_t { bitmask, panels };

// The geometry of a convolution: images of `channels` planes height x width, row by row. Padding is with
// zeros, on both sides. Sizes are such that the output has at least one position, and a padded image less
// than 2^32 floats.
struct Conv2d {
  std::size_t channels, height, width;
  std::size_t kernel_h, kernel_w, stride_h = 1, stride_w = 1, pad_h = 0, pad_w = 0, dilation_h = 1,
                                  dilation_w = 1;

  std::size_t out_height() const;
  std::size_t out_width() const;
};

// rows x cols weights (out x in). Immutable but for panels, which are built once each and kept; every method
// may be called by several threads at once.
class PackedMatrix {
 public:
  // A weight is pruned where it is exactly 0. `w` is rows x cols, of any strides, float16, bfloat16 or
  // float32.
  PackedMatrix(const View& w, std::size_t rows, std::size_t cols);

  // From the form on disk: `bits` has ceil(cols / 8) bytes a row, lowest bit first; `values` the nnz values,
  // row by row. Throws std::invalid_argument where they do not fit together.
  PackedMatrix(std::size_t rows, std::size_t cols, const std::uint8_t* bits, const View& values);
  ~PackedMatrix();

  std::size_t rows() const { return rows_; }
  std::size_t cols() const { return cols_; }
  std::size_t nnz() const { return row_start_.back(); }
  DType dtype() const { return dtype_; }
  std::size_t bytes() const;        // of the canonical form
  std::size_t panel_bytes() const;  // of the panels built so far
  std::size_t shared_rows() const {
    return shared_rows_;
  }  // 4 where every aligned four rows share their columns, else 0

  void bits(std::uint8_t* to) const;  // rows * ceil(cols / 8) bytes
  const void* values() const { return values_.as<char>(); }
  void unpack(void* to) const;  // rows * cols elements in C order

  // Builds what linear() would build for that many tokens.
  void prepare(ProductKernel kernel, std::size_t tokens) const;

  // y[tokens x rows] = activation(x[tokens x cols] W^T + bias), all row-major float32 and contiguous; y
  // overlaps nothing. `activation` is one of "", "relu", "gelu", "gelu_tanh", "silu".
  void linear(ProductKernel kernel, const float* x, std::size_t tokens, const float* bias,
              const std::string& activation, float* y) const;

  // The same for bfloat16 x and y; sums are float32.
  void linear(ProductKernel kernel, const std::uint16_t* x, std::size_t tokens, const float* bias,
              const std::string& activation, std::uint16_t* y) const;

  // Images [rows x out_height x out_width] of y from images of x, both contiguous in themselves and a stride
  // of floats apart; cols() is channels * kernel_h * kernel_w, in this order.
  void conv2d(const Conv2d& c, const float* x, std::size_t x_stride, std::size_t images, const float* bias,
              const std::string& activation, float* y, std::size_t y_stride) const;

 private:
  void index_rows();
  double density() const;
  BitmaskView view() const;
  const Panels& panels(std::size_t depth) const;
  PanelView panel_view(std::size_t depth) const;

  std::size_t rows_, cols_, row_words_;
  DType dtype_;
  Memory words_;
  std::vector<std::uint64_t> row_start_;
  Memory values_;  // nnz values; kernels read past them
  std::size_t shared_rows_ = 0;
  mutable std::mutex mutex_;
  mutable std::vector<std::unique_ptr<Panels>> panels_;
};

}  // namespace sparsam
