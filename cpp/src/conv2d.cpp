// Convolutions by panels, over tiles that are gathered from the images.
#include <array>
#include <vector>

#include "panel_tiles.hpp"
#include "sparsam/isa.hpp"
#include "table.hpp"

namespace sparsam {
namespace {

// Images in, images out; each depth of a volume is an image. A tile's columns are positions of one output
// image, row by row, with a row length at which every vector of positions is contiguous in memory: the
// output's width rounded up to whole vectors if that fits the input's rows, else the length of those rows.
// Results for positions past the output's width are discarded.
struct ConvProduct : PanelTiles {
  const Conv3d& c;
  const float* x;  // volumes as `Padded` stores them, or the originals
  std::size_t volume_floats, slice_floats, row_floats, volumes, depths, slack;
  const std::uint32_t* columns;
  float* y;
  std::size_t y_stride;  // floats from one volume of y to the next
  std::size_t pitch, positions;

  // `d` depths of each of `n` volumes of y.
  ConvProduct(const PanelTiles& t, const Conv3d& conv, const float* from, std::size_t stride,
              std::size_t slice, std::size_t row, std::size_t n, std::size_t d, std::size_t readable,
              const std::uint32_t* starts, float* to, std::size_t to_stride)
      : PanelTiles(t),
        c(conv),
        x(from),
        volume_floats(stride),
        slice_floats(slice),
        row_floats(row),
        volumes(n),
        depths(d),
        slack(readable),
        columns(starts),
        y(to),
        y_stride(to_stride) {
    const std::size_t whole = (c.out_width() + m.lanes - 1) / m.lanes * m.lanes;
    pitch = whole <= row_floats ? whole : row_floats;
    positions = (c.out_height() - 1) * pitch + c.out_width();
  }

  std::size_t tiles_per_image() const { return (positions + wide() - 1) / wide(); }
  std::size_t tiles() const { return volumes * depths * tiles_per_image(); }

  const float* image_of(std::size_t tile) const {
    const std::size_t image = tile / tiles_per_image();
    return x + image / depths * volume_floats + image % depths * c.stride_d * slice_floats;
  }

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
    m.gather(image_of(tile), columns + d * w.depth, columns_of(d), w.depth, sources, here,
             packed + d * (w.depth + 1) * here * m.lanes);
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
    const std::size_t image = tile / tiles_per_image(), pixels = c.out_height() * c.out_width();
    kernel.panel_across(w, row_block, packed, vectors_of(first), sums, epilogue, stretches.data(), n,
                        y + image / depths * y_stride + image % depths * pixels, c.out_depth() * pixels);
  }
};

// Layout of a volume that is copied with its padding, or of as many slices of it as some depths of the output
// need: for each channel, slice after slice, one plane for each phase of the strides, so that neighbouring
// outputs read neighbouring elements.
struct Padded {
  const Conv3d& c;
  std::size_t slices, rows, row_floats;

  Padded(const Conv3d& conv, std::size_t depths)
      : c(conv),
        slices((depths - 1) * c.stride_d + (c.kernel_d - 1) * c.dilation_d + 1),
        rows((c.height + 2 * c.pad_h + c.stride_h - 1) / c.stride_h),
        row_floats((c.width + 2 * c.pad_w + c.stride_w - 1) / c.stride_w) {}

  std::size_t plane() const { return rows * row_floats; }
  std::size_t slice_floats() const { return c.stride_h * c.stride_w * plane(); }
  std::size_t channel_floats() const { return slices * slice_floats(); }
  std::size_t volume_floats() const { return c.channels * channel_floats(); }

  std::vector<std::uint32_t> columns() const { return columns(channel_floats()); }
  // With channels so many floats apart.
  std::vector<std::uint32_t> columns(std::size_t apart) const {
    std::vector<std::uint32_t> starts;
    starts.reserve(c.channels * c.kernel_d * c.kernel_h * c.kernel_w);
    for (std::size_t channel = 0; channel < c.channels; ++channel)
      for (std::size_t d = 0; d < c.kernel_d; ++d)
        for (std::size_t i = 0; i < c.kernel_h; ++i)
          for (std::size_t j = 0; j < c.kernel_w; ++j) {
            const std::size_t h = i * c.dilation_h, w = j * c.dilation_w;
            const std::size_t phase = (h % c.stride_h) * c.stride_w + w % c.stride_w;
            starts.push_back(static_cast<std::uint32_t>(channel * apart + d * c.dilation_d * slice_floats() +
                                                        phase * plane() + h / c.stride_h * row_floats +
                                                        w / c.stride_w));
          }
    return starts;
  }

  // A channel, from a slice of the padded volume on.
  void copy(const float* channel, std::size_t first, float* to) const {
    for (std::size_t s = first; s < first + slices; ++s, to += slice_floats()) {
      if (s < c.pad_d || s >= c.pad_d + c.depth)
        std::fill_n(to, slice_floats(), 0.0f);
      else
        copy_slice(channel + (s - c.pad_d) * c.height * c.width, to);
    }
  }

  void copy_slice(const float* channel, float* to) const {
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

constexpr std::size_t kImageBytes = 4 << 20;    // of padded images at a time: they stay in the caches
constexpr std::size_t kVolumeBytes = 16 << 20;  // of one volume; of larger ones some depths at a time

}  // namespace

std::size_t Conv2d::out_height() const {
  return (height + 2 * pad_h - dilation_h * (kernel_h - 1) - 1) / stride_h + 1;
}

std::size_t Conv2d::out_width() const {
  return (width + 2 * pad_w - dilation_w * (kernel_w - 1) - 1) / stride_w + 1;
}

std::size_t Conv3d::out_depth() const {
  return (depth + 2 * pad_d - dilation_d * (kernel_d - 1) - 1) / stride_d + 1;
}

void conv2d(const Form& form, const Conv2d& c, const float* x, std::size_t x_stride, std::size_t images,
            const float* bias, const std::string& activation, float* y, std::size_t y_stride) {
  conv3d(form, Conv3d{c}, x, x_stride, images, bias, activation, y, y_stride);
}

void conv3d(const Form& form, const Conv3d& c, const float* x, std::size_t x_stride, std::size_t volumes,
            const float* bias, const std::string& activation, float* y, std::size_t y_stride) {
  const Epilogue epilogue{bias, activation_of(activation)};
  if (form.rows() == 0 || volumes == 0) return;
  const MatmulKernels& m = kernels().matmul;  // read once: another thread may call use_isa()
  const PanelView w = form.panels();
  const std::size_t pixels = c.out_height() * c.out_width(), depths = c.out_depth();
  const PanelTiles tiles{w, m, kernels_for(m, form.dtype()), tile_vectors(pixels, m, w), epilogue};
  const bool parallel = volumes * depths * pixels * form.nnz() >= kSerialBelow;
  const std::size_t slice = c.height * c.width;
  // Without padding and strides within slices, these are read in place.
  if (c.kernel_h * c.kernel_w * c.stride_h * c.stride_w == 1 && c.pad_d + c.pad_h + c.pad_w == 0) {
    const std::vector<std::uint32_t> columns = Padded(c, depths).columns(c.depth * slice);
    run_tiles(
        ConvProduct(tiles, c, x, x_stride, slice, c.width, volumes, depths, 0, columns.data(), y, y_stride),
        parallel);
    return;
  }
  // Some volumes at a time, or some depths of one.
  std::size_t here_depths = depths;
  while (here_depths > 1 && Padded(c, here_depths).volume_floats() * sizeof(float) > kVolumeBytes)
    here_depths = (here_depths + 1) / 2;
  const Padded padded(c, here_depths);
  const std::vector<std::uint32_t> columns = padded.columns();
  const std::size_t floats = padded.volume_floats(), channel = padded.channel_floats(), slack = 2 * m.lanes;
  const std::size_t step =
      here_depths < depths ? 1 : std::max<std::size_t>(1, kImageBytes / (floats * sizeof(float)));
  const Scratch<Purpose::images> scratch(std::min(step, volumes) * floats + padded.row_floats + slack);
  float* const copies = scratch.data();
  for (std::size_t first = 0; first < volumes; first += step)
    for (std::size_t top = 0; top < depths; top += here_depths) {
      const std::size_t here = std::min(step, volumes - first), tasks = here * c.channels;
      for_each_task(
          tasks, worker_count(tasks, here * floats >= kSerialBelow), [&](std::size_t, std::size_t task) {
            padded.copy(x + (first + task / c.channels) * x_stride + task % c.channels * c.depth * slice,
                        top * c.stride_d, copies + task * channel);
          });
      run_tiles(ConvProduct(tiles, c, copies, floats, padded.slice_floats(), padded.row_floats, here,
                            std::min(here_depths, depths - top), slack, columns.data(),
                            y + first * y_stride + top * pixels, y_stride),
                parallel);
    }
}

}  // namespace sparsam
