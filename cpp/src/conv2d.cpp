// Convolutions by panels, over tiles that are gathered from the images.
#include <array>
#include <vector>

#include "panel_tiles.hpp"
#include "sparsam/isa.hpp"
#include "table.hpp"

namespace sparsam {
namespace {

// Images in, images out. A tile's columns are positions of one output image, row by row, with a row length at
// which every vector of positions is contiguous in memory: the output's width rounded up to whole vectors if
// that fits the input's rows, else the length of those rows. Results for positions past the output's width
// are discarded.
struct ConvProduct : PanelTiles {
  const Conv2d& c;
  const float* x;  // images as `Padded` stores them, or the originals
  std::size_t image_floats, row_floats, images, slack;
  const std::uint32_t* columns;
  float* y;
  std::size_t y_stride;  // floats from one image of y to the next
  std::size_t pitch, positions;

  ConvProduct(const PanelTiles& t, const Conv2d& conv, const float* from, std::size_t stride, std::size_t row,
              std::size_t n, std::size_t readable, const std::uint32_t* starts, float* to,
              std::size_t to_stride)
      : PanelTiles(t),
        c(conv),
        x(from),
        image_floats(stride),
        row_floats(row),
        images(n),
        slack(readable),
        columns(starts),
        y(to),
        y_stride(to_stride) {
    const std::size_t whole = (c.out_width() + m.lanes - 1) / m.lanes * m.lanes;
    pitch = whole <= row_floats ? whole : row_floats;
    positions = (c.out_height() - 1) * pitch + c.out_width();
  }

  std::size_t tiles_per_image() const { return (positions + wide() - 1) / wide(); }
  std::size_t tiles() const { return images * tiles_per_image(); }

  // The last tile of an image has only as many vectors as it needs.
  std::size_t vectors_of(std::size_t first) const {
    const std::size_t needed = (positions - first + m.lanes - 1) / m.lanes;
    return std::min(vectors, needed <= 2 ? needed : kMaxVectors);
  }

  void pack(std::size_t tile, std::size_t d, float* packed) const {
    const std::size_t first = tile % tiles_per_image() * wide(), here = vectors_of(first);
    Source sources[kMaxVectors];
    for (std::size_t v = 0; v < here; ++v) {
      const std::size_t p = first + v * m.lanes;
      const std::size_t left = p < positions ? positions - p : 0;
      sources[v] = {left == 0 ? 0 : p / pitch * row_floats + p % pitch,
                    left == 0 ? 0 : std::min(m.lanes, left + slack)};
    }
    m.gather(x + tile / tiles_per_image() * image_floats, columns + d * w.depth, columns_of(d), w.depth,
             sources, here, packed + d * (w.depth + 1) * here * m.lanes);
  }

  void multiply(std::size_t tile, std::size_t row_block, const float* packed, float* sums) const {
    const std::size_t first = tile % tiles_per_image() * wide(), end = std::min(first + wide(), positions);
    std::array<Stretch, kMaxVectors * kMaxLanes> stretches;  // at most one for each position
    std::size_t n = 0;
    for (std::size_t row = first / pitch; row * pitch < end; ++row) {
      const std::size_t from = std::max(first, row * pitch), to = std::min(end, row * pitch + c.out_width());
      if (from >= to) continue;
      const Stretch s{from - first, to - from, row * c.out_width() + from - row * pitch};
      if (n > 0 && stretches[n - 1].from + stretches[n - 1].count == s.from)
        stretches[n - 1].count += s.count;
      else
        stretches[n++] = s;
    }
    kernel.panel_across(w, row_block, packed, vectors_of(first), sums, epilogue, stretches.data(), n,
                        y + tile / tiles_per_image() * y_stride, c.out_height() * c.out_width());
  }
};

// Layout of an image that is copied with its padding: one plane for each channel and each phase of the
// strides, so that neighbouring outputs read neighbouring elements.
struct Padded {
  const Conv2d& c;
  std::size_t rows, row_floats;

  explicit Padded(const Conv2d& conv)
      : c(conv),
        rows((c.height + 2 * c.pad_h + c.stride_h - 1) / c.stride_h),
        row_floats((c.width + 2 * c.pad_w + c.stride_w - 1) / c.stride_w) {}

  // Without padding and strides, images are read in place.
  bool as_it_came() const {
    return c.kernel_h * c.kernel_w * c.stride_h * c.stride_w == 1 && c.pad_h + c.pad_w == 0;
  }
  std::size_t plane() const { return rows * row_floats; }
  std::size_t image_floats() const { return c.channels * c.stride_h * c.stride_w * plane(); }

  std::vector<std::uint32_t> columns() const {
    std::vector<std::uint32_t> starts;
    starts.reserve(c.channels * c.kernel_h * c.kernel_w);
    for (std::size_t channel = 0; channel < c.channels; ++channel)
      for (std::size_t i = 0; i < c.kernel_h; ++i)
        for (std::size_t j = 0; j < c.kernel_w; ++j) {
          const std::size_t h = i * c.dilation_h, w = j * c.dilation_w;
          const std::size_t phase = (h % c.stride_h) * c.stride_w + w % c.stride_w;
          starts.push_back(static_cast<std::uint32_t>((channel * c.stride_h * c.stride_w + phase) * plane() +
                                                      h / c.stride_h * row_floats + w / c.stride_w));
        }
    return starts;
  }

  void copy(const float* channel, float* to) const {
    for (std::size_t a = 0; a < c.stride_h; ++a)
      for (std::size_t b = 0; b < c.stride_w; ++b, to += plane())
        for (std::size_t r = 0; r < rows; ++r) {
          float* const row = to + r * row_floats;
          const std::size_t h = r * c.stride_h + a;  // in the padded image, as below
          if (h < c.pad_h || h >= c.pad_h + c.height) {
            std::fill(row, row + row_floats, 0.0f);
            continue;
          }
          const float* const from = channel + (h - c.pad_h) * c.width;
          if (c.stride_w == 1) {
            std::fill(row, row + c.pad_w, 0.0f);
            std::copy(from, from + c.width, row + c.pad_w);
            std::fill(row + c.pad_w + c.width, row + row_floats, 0.0f);
            continue;
          }
          for (std::size_t i = 0; i < row_floats; ++i) {
            const std::size_t w = i * c.stride_w + b;
            row[i] = w < c.pad_w || w >= c.pad_w + c.width ? 0.0f : from[w - c.pad_w];
          }
        }
  }
};

constexpr std::size_t kImageBytes = 4 << 20;  // of padded images at a time: they stay in the caches

}  // namespace

std::size_t Conv2d::out_height() const {
  return (height + 2 * pad_h - dilation_h * (kernel_h - 1) - 1) / stride_h + 1;
}

std::size_t Conv2d::out_width() const {
  return (width + 2 * pad_w - dilation_w * (kernel_w - 1) - 1) / stride_w + 1;
}

void conv2d(const Form& form, const Conv2d& c, const float* x, std::size_t x_stride, std::size_t images,
            const float* bias, const std::string& activation, float* y, std::size_t y_stride) {
  const Epilogue epilogue{bias, activation_of(activation)};
  if (form.rows() == 0 || images == 0) return;
  const MatmulKernels& m = kernels().matmul;  // read once: another thread may call use_isa()
  const PanelView w = form.panels();
  const std::size_t positions = c.out_height() * c.out_width();
  const PanelTiles tiles{w, m, kernels_for(m, form.dtype()), tile_vectors(positions, m, w), epilogue};
  const Padded padded(c);
  const std::vector<std::uint32_t> columns = padded.columns();
  const bool parallel = images * positions * form.nnz() >= kSerialBelow;
  if (padded.as_it_came()) {
    run_tiles(ConvProduct(tiles, c, x, x_stride, c.width, images, 0, columns.data(), y, y_stride), parallel);
    return;
  }
  const std::size_t floats = padded.image_floats(), planes = floats / c.channels, slack = 2 * m.lanes;
  const std::size_t step = std::max<std::size_t>(1, kImageBytes / (floats * sizeof(float)));
  const Scratch<Purpose::images> scratch(std::min(step, images) * floats + padded.row_floats + slack);
  float* const copies = scratch.data();
  for (std::size_t first = 0; first < images; first += step) {
    const std::size_t here = std::min(step, images - first), tasks = here * c.channels;
    for_each_task(
        tasks, worker_count(tasks, here * floats >= kSerialBelow), [&](std::size_t, std::size_t task) {
          padded.copy(x + (first + task / c.channels) * x_stride + task % c.channels * c.height * c.width,
                      copies + task * planes);
        });
    run_tiles(ConvProduct(tiles, c, copies, floats, padded.row_floats, here, slack, columns.data(),
                          y + first * y_stride, y_stride),
              parallel);
  }
}

}  // namespace sparsam
