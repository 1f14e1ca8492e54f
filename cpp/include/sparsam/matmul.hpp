// Products with a packed weight. Each takes the form that its kernel reads; none is built here.
#pragma once
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "sparsam/forms.hpp"

namespace sparsam {

// y[batch x rows] = activation(x[batch x cols] W^T + bias), all row-major float32 and contiguous; y overlaps
// nothing. `activation` is one of "", "relu", "gelu", "gelu_tanh", "silu".
void linear(const Form& w, const float* x, std::size_t batch, const float* bias,
            const std::string& activation, float* y);

// The same for bfloat16 x and y; sums are float32.
void linear(const Form& w, const std::uint16_t* x, std::size_t batch, const float* bias,
            const std::string& activation, std::uint16_t* y);

// With int8 values in slots: how many of the rows of x, the first ones, are multiplied by quads, which give
// the same bits (kernels/int8.hpp). And whether quads are used wherever they can be, or nowhere, instead of
// where they are expected to be faster: for measuring and testing.
std::size_t quad_rows(const Form& w, std::size_t batch);
void use_quads(std::optional<bool> wanted);

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

// Images [rows x out_height x out_width] of y from images of x, both contiguous in themselves and a stride
// of floats apart; w has channels * kernel_h * kernel_w columns, in this order, and is in panels.
void conv2d(const Form& w, const Conv2d& c, const float* x, std::size_t x_stride, std::size_t images,
            const float* bias, const std::string& activation, float* y, std::size_t y_stride);

// The same for volumes, of `channels` times `depth` planes.
struct Conv3d : Conv2d {
  std::size_t depth = 1, kernel_d = 1, stride_d = 1, pad_d = 0, dilation_d = 1;

  std::size_t out_depth() const;
};

// Volumes [rows x out_depth x out_height x out_width] of y; w has channels * kernel_d * kernel_h * kernel_w
// columns.
void conv3d(const Form& w, const Conv3d& c, const float* x, std::size_t x_stride, std::size_t volumes,
            const float* bias, const std::string& activation, float* y, std::size_t y_stride);

// Floats from one image to the next, and from one pixel of a channel to the next: 1 where channels are
// planes, else channels are neighbours.
struct ImageStrides {
  std::size_t image, pixel;
};

// The same for int8 values in slots, which were packed with the kernel's Taps. x is rounded to bytes by the
// rule of linear layers (kernels/int8.hpp) with one scale for each image, so that y is the same on every
// machine; all of an image is NaN where not all of its x is finite.
void int8_conv2d(const Form& w, const Conv2d& c, const float* x, ImageStrides x_strides, std::size_t images,
                 const float* bias, const std::string& activation, float* y, ImageStrides y_strides);

}  // namespace sparsam
