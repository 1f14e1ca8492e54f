#include "int8_images.hpp"

#include <algorithm>
#include <cstring>
#include <vector>

#include "chunks.hpp"

namespace sparsam {
namespace {

constexpr std::size_t kPart = std::size_t{1} << 14;  // numbers of a task
constexpr std::size_t kPixels = 256;                 // of planes, rounded together

// Eight rows of eight bytes, `stride` apart, to eight columns. Bytes of low addresses are low ones.
void transpose_bytes(const std::uint8_t* from, std::size_t stride, std::uint8_t* to, std::size_t to_stride) {
  std::uint64_t row[8];
  for (std::size_t i = 0; i < 8; ++i) std::memcpy(row + i, from + i * stride, 8);
  const auto swap = [&](std::size_t apart,
                        std::uint64_t low) {  // the upper parts of some with the lower ones
    for (std::size_t i = 0; i < 8; ++i) {
      if ((i & apart) != 0) continue;
      const std::uint64_t both = (row[i] >> 8 * apart ^ row[i + apart]) & low;
      row[i + apart] ^= both;
      row[i] ^= both << 8 * apart;
    }
  };
  swap(4, 0x00000000ffffffff);
  swap(2, 0x0000ffff0000ffff);
  swap(1, 0x00ff00ff00ff00ff);
  for (std::size_t i = 0; i < 8; ++i) std::memcpy(to + i * to_stride, row + i, 8);
}

// `n` pixels of planes, which begin at x, `plane` floats apart.
void round_planes(const Int8Kernels& kernel, const float* x, std::size_t plane, std::size_t channels,
                  std::size_t n, std::uint32_t largest, std::uint8_t* to) {
  constexpr std::size_t kTogether = 8;
  std::uint8_t rows[kTogether][kPixels];
  for (std::size_t channel = 0; channel < channels; channel += kTogether) {
    const std::size_t here = std::min(kTogether, channels - channel);
    for (std::size_t i = 0; i < here; ++i) kernel.round(x + (channel + i) * plane, n, largest, rows[i]);
    std::size_t p = 0;
    if (here == kTogether)
      for (; p + kTogether <= n; p += kTogether)
        transpose_bytes(rows[0] + p, kPixels, to + p * channels + channel, channels);
    for (; p < n; ++p)
      for (std::size_t i = 0; i < here; ++i) to[p * channels + channel + i] = rows[i][p];
  }
}

}  // namespace

void quantise_images(const Int8Kernels& kernel, const Conv2d& c, const float* x, ImageStrides strides,
                     std::size_t images, std::uint8_t* bytes, float* scales) {
  const std::size_t pixels = c.height * c.width, whole = pixels * c.channels;
  if (whole == 0) {  // no channels
    std::fill_n(scales, images, 0.0f);
    return;
  }
  const bool planes = strides.pixel == 1, together = planes || strides.pixel == c.channels;
  // Lines of numbers that lie together: the whole image, or each of its pixels.
  const std::size_t lines = together ? 1 : pixels, length = whole / lines;
  const std::size_t per_line = (length + kPart - 1) / kPart,
                    lines_each = std::max<std::size_t>(1, kPart / length);
  const std::size_t parts = together ? per_line : (lines + lines_each - 1) / lines_each;
  const bool parallel = images * whole >= kSerialBelow / 4;
  std::vector<std::uint32_t> found(images * parts, 0);
  for_each_task(images * parts, worker_count(images * parts, parallel), [&](std::size_t, std::size_t task) {
    const float* const image = x + task / parts * strides.image;
    const std::size_t part = task % parts;
    if (together) {
      const std::size_t from = part * kPart;
      found[task] = kernel.largest(image + from, std::min(kPart, length - from));
      return;
    }
    for (std::size_t p = part * lines_each; p < std::min(lines, (part + 1) * lines_each); ++p)
      found[task] = std::max(found[task], kernel.largest(image + p * strides.pixel, length));
  });
  std::vector<std::uint32_t> largest(images);
  for (std::size_t i = 0; i < images; ++i) {
    largest[i] = *std::max_element(found.begin() + static_cast<std::ptrdiff_t>(i * parts),
                                   found.begin() + static_cast<std::ptrdiff_t>((i + 1) * parts));
    scales[i] = kernel.round(x, 0, largest[i], bytes);
  }

  const std::size_t step = planes ? kPixels : std::max<std::size_t>(1, kPart / c.channels);
  const std::size_t blocks = (pixels + step - 1) / step;
  for_each_task(images * blocks, worker_count(images * blocks, parallel), [&](std::size_t, std::size_t task) {
    const std::size_t image = task / blocks, first = task % blocks * step, n = std::min(step, pixels - first);
    const float* const from = x + image * strides.image + first * strides.pixel;
    std::uint8_t* const to = bytes + image * whole + first * c.channels;
    if (planes)
      round_planes(kernel, from, pixels, c.channels, n, largest[image], to);
    else if (together)
      kernel.round(from, n * c.channels, largest[image], to);
    else
      for (std::size_t p = 0; p < n; ++p)
        kernel.round(from + p * strides.pixel, c.channels, largest[image], to + p * c.channels);
  });
}

Int8Windows::Int8Windows(const Conv2d& c, std::size_t positions)
    : c_(c), out_height_(c.out_height()), out_width_(c.out_width()), pixel_(c.kernel_h * c.channels) {
  // Windows next to each other share pixels where their columns are neighbours; short rows are copied
  // window by window, so that a pass has enough of them, and so are windows with pixels between them.
  const bool unpadded_row = c.kernel_h == 1 && c.pad_h + c.pad_w == 0;
  overlapping_ = (c.dilation_w == 1 || c.kernel_w == 1) &&
                 (out_width_ > kInt8Batch / 2 || out_height_ == 1) &&
                 (c.stride_w <= c.kernel_w || unpadded_row);
  in_place_ = overlapping_ && unpadded_row;
  const std::size_t bytes = in_place_ ? 1 : std::max<std::size_t>(1, stride());
  const std::size_t most = std::max(kInt8Batch, std::min(positions, kTileBytes / bytes));
  pieces_ = out_width_ > most + most / 2 ? (out_width_ + most - 1) / most : 1;
  const std::size_t rows = std::max<std::size_t>(1, most / out_width_);
  row_tiles_ = (out_height_ + rows - 1) / rows;
}

Int8Windows::Tile Int8Windows::tile(std::size_t number) const {
  if (pieces_ > 1) {
    const std::size_t piece = number % pieces_, from = out_width_ * piece / pieces_;
    return {number / pieces_, 1, from, out_width_ * (piece + 1) / pieces_ - from};
  }
  const std::size_t from = out_height_ * number / row_tiles_;
  return {from, out_height_ * (number + 1) / row_tiles_ - from, 0, out_width_};
}

std::size_t Int8Windows::largest_count() const {
  return pieces_ > 1 ? (out_width_ + pieces_ - 1) / pieces_
                     : (out_height_ + row_tiles_ - 1) / row_tiles_ * out_width_;
}

std::size_t Int8Windows::tile_bytes() const {
  if (in_place_) return 0;
  const std::size_t width = pieces_ > 1 ? largest_count() : out_width_;
  return overlapping_ ? largest_count() / width * line_bytes(width) : largest_count() * stride();
}

void Int8Windows::fill(const Tile& tile, const std::uint8_t* image, std::uint8_t* to) const {
  if (overlapping_) {
    for (std::size_t r = 0; r < tile.rows; ++r, to += line_bytes(tile.width))
      for (std::size_t tap = 0; tap < c_.kernel_h; ++tap) fill_line(tile, tile.row + r, tap, image, to);
    return;
  }
  for (std::size_t r = 0; r < tile.rows; ++r)
    for (std::size_t q = 0; q < tile.width; ++q, to += stride())
      fill_window(tile.row + r, tile.column + q, image, to);
}

const std::uint8_t* Int8Windows::rows_of(const Tile& tile, const std::uint8_t* from) const {
  return in_place_ ? from + (tile.row * c_.stride_h * c_.width + tile.column * c_.stride_w) * c_.channels
                   : from;
}

// One row of taps of all windows in a row of them.
void Int8Windows::fill_line(const Tile& tile, std::size_t row, std::size_t tap, const std::uint8_t* image,
                            std::uint8_t* to) const {
  const std::size_t pixels = (tile.width - 1) * c_.stride_w + c_.kernel_w;
  const std::size_t h = row * c_.stride_h + tap * c_.dilation_h, first = tile.column * c_.stride_w;
  const bool outside = h < c_.pad_h || h >= c_.pad_h + c_.height;
  const std::uint8_t* const from = outside ? nullptr : image + (h - c_.pad_h) * c_.width * c_.channels;
  to += tap * c_.channels;
  for (std::size_t i = 0; i < pixels; ++i, to += pixel_) {
    const std::size_t w = first + i;  // in the padded image, as h
    if (outside || w < c_.pad_w || w >= c_.pad_w + c_.width)
      std::memset(to, kInt8Zero, c_.channels);
    else
      std::memcpy(to, from + (w - c_.pad_w) * c_.channels, c_.channels);
  }
}

void Int8Windows::fill_window(std::size_t row, std::size_t column, const std::uint8_t* image,
                              std::uint8_t* to) const {
  for (std::size_t j = 0; j < c_.kernel_w; ++j)
    for (std::size_t i = 0; i < c_.kernel_h; ++i, to += c_.channels) {
      const std::size_t h = row * c_.stride_h + i * c_.dilation_h;
      const std::size_t w = column * c_.stride_w + j * c_.dilation_w;
      if (h < c_.pad_h || h >= c_.pad_h + c_.height || w < c_.pad_w || w >= c_.pad_w + c_.width)
        std::memset(to, kInt8Zero, c_.channels);
      else
        std::memcpy(to, image + ((h - c_.pad_h) * c_.width + w - c_.pad_w) * c_.channels, c_.channels);
    }
}

}  // namespace sparsam
