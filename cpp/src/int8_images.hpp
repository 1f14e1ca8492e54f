// Images as bytes, for convolutions with int8 values.
#pragma once
#include <cstddef>
#include <cstdint>

#include "int8.hpp"
#include "sparsam/matmul.hpp"

namespace sparsam {

// Rounds images to bytes [pixel][channel], one image after the other, with one scale for each image, by the
// rule of Int8Kernels::quantise. `largest` has room for as many numbers as there are images.
void quantise_images(const Int8Kernels& kernel, const Conv2d& c, const float* x, ImageStrides strides,
                     std::size_t images, std::uint8_t* bytes, float* scales);

// The windows of an image of bytes as rows of x, whose columns are in the order of Taps::place. Output
// positions are worked on in tiles: some whole rows of them, or a piece of a row.
class Int8Windows {
 public:
  struct Tile {
    std::size_t row, rows, column, width;
    std::size_t count() const { return rows * width; }
  };
  // Rows of x of up to kInt8Batch positions: the bytes where they begin, and their first position in the
  // tile.
  struct Pass {
    std::size_t from, first, count;
  };

  // Tiles have about `positions` positions, or so few that they take at most kTileBytes.
  Int8Windows(const Conv2d& c, std::size_t positions);

  std::size_t tiles() const { return out_height_ > 1 && pieces_ == 1 ? row_tiles_ : out_height_ * pieces_; }
  Tile tile(std::size_t number) const;
  std::size_t largest_count() const;
  std::size_t first_position(const Tile& tile) const { return tile.row * out_width_ + tile.column; }
  // Whether windows are read where they lie in the image, so that nothing need be copied.
  bool in_place() const { return in_place_; }
  std::size_t tile_bytes() const;  // of the copy that `fill` makes of the largest tile
  void fill(const Tile& tile, const std::uint8_t* image, std::uint8_t* to) const;
  // Where the rows of x begin in a filled copy, or in an image where windows are read in place; and the bytes
  // from one position to the next.
  const std::uint8_t* rows_of(const Tile& tile, const std::uint8_t* from) const;
  std::size_t stride() const { return overlapping_ ? c_.stride_w * pixel_ : c_.kernel_w * pixel_; }

  template <class Visit>
  void for_each_pass(const Tile& tile, Visit&& visit) const {  // visit(pass)
    const std::size_t lines = overlapping_ ? tile.rows : 1, length = tile.count() / lines;
    const std::size_t passes = (length + kInt8Batch - 1) / kInt8Batch;
    for (std::size_t line = 0; line < lines; ++line)
      for (std::size_t pass = 0; pass < passes; ++pass) {
        const std::size_t from = length * pass / passes, end = length * (pass + 1) / passes;
        visit(Pass{line * line_bytes(tile.width) + from * stride(), line * length + from, end - from});
      }
  }

 private:
  static constexpr std::size_t kTileBytes = 256 << 10;

  // Of a row of overlapping windows.
  std::size_t line_bytes(std::size_t width) const {
    return in_place_ ? c_.stride_h * c_.width * pixel_ : ((width - 1) * c_.stride_w + c_.kernel_w) * pixel_;
  }
  void fill_line(const Tile& tile, std::size_t row, std::size_t tap, const std::uint8_t* image,
                 std::uint8_t* to) const;
  void fill_window(std::size_t row, std::size_t column, const std::uint8_t* image, std::uint8_t* to) const;

  Conv2d c_;
  std::size_t out_height_, out_width_;
  std::size_t pixel_;  // bytes of a column of a window: the channels of kernel_h pixels
  bool overlapping_, in_place_;
  std::size_t pieces_, row_tiles_;
};

}  // namespace sparsam
