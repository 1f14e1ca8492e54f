// Products with a packed matrix: by bitmask, and by panels in tiles of tokens.
#include <algorithm>
#include <array>
#include <iterator>
#include <stdexcept>
#include <vector>

#include "chunks.hpp"
#include "panels.hpp"
#include "sparsam/isa.hpp"
#include "sparsam/matrix.hpp"
#include "table.hpp"

namespace sparsam {
namespace {

// How many vectors of tokens a tile holds, and how many columns a block, so that the block's part of a tile
// (16 or 32 KiB) stays in the L1 cache beside the streams. Four rows of four vectors fill half of AVX-512's
// registers; the other rows have 16 registers and take two. Few entries per row and block would spend their
// time on the sums, so very sparse matrices take deeper blocks and narrower tiles too.
struct TileShape {
  std::size_t vectors, depth;
};

TileShape tile_shape(std::size_t tokens, std::size_t lanes, double density) {
  if (tokens <= lanes) return {1, 256};
  if (tokens <= 2 * lanes || lanes < 16 || density < 0.12) return {2, 256};
  return {4, 128};
}

// Memory that a thread keeps between its calls; one block for each purpose.
enum class Purpose { tiles, input, output };

template <Purpose>
float* scratch(std::size_t floats) {
  thread_local Memory memory;
  if (memory.bytes() < floats * sizeof(float)) {
    memory = Memory();  // first free, then take
    memory = Memory(floats * sizeof(float));
  }
  return memory.as<float>();
}

Activation activation_of(const std::string& name) {
  constexpr const char* kNames[] = {"", "relu", "gelu", "gelu_tanh", "silu"};
  for (std::size_t i = 0; i < std::size(kNames); ++i)
    if (name == kNames[i]) return static_cast<Activation>(i);
  throw std::invalid_argument("activation '" + name + "': expected relu, gelu, gelu_tanh or silu");
}

const ProductKernels& kernels_for(const MatmulKernels& m, DType dtype) {
  return dtype == DType::f32 ? m.f32 : dtype == DType::bf16 ? m.bf16 : m.f16;
}

void bitmask_product(const BitmaskView& w, DType dtype, const float* x, std::size_t tokens, Epilogue epilogue,
                     float* y) {
  constexpr std::size_t kTokens = 4;
  const ProductKernels& kernel = kernels_for(kernels().matmul, dtype);
  const std::size_t x_stride = w.row_words * 64;
  const std::size_t step = std::max<std::size_t>(64, ((std::size_t{1} << 17) / (x_stride + 1)) / 64 * 64);
  for (std::size_t t = 0; t < tokens; t += kTokens) {
    const std::size_t here = std::min(kTokens, tokens - t);
    const float* from = x + t * w.cols;
    if (w.cols != x_stride) {  // the kernel reads whole words of columns
      float* padded = scratch<Purpose::tiles>(here * x_stride);
      for (std::size_t i = 0; i < here; ++i) {
        std::copy(from + i * w.cols, from + (i + 1) * w.cols, padded + i * x_stride);
        std::fill(padded + i * x_stride + w.cols, padded + (i + 1) * x_stride, 0.0f);
      }
      from = padded;
    }
    const std::size_t tasks = (w.rows + step - 1) / step;
    for_each_task(tasks, worker_count(tasks, w.rows * w.cols >= kSerialBelow),
                  [&](std::size_t, std::size_t task) {
                    kernel.bitmask(w, task * step, std::min(w.rows, (task + 1) * step), from, x_stride, here,
                                   epilogue, y + t * w.rows, w.rows);
                  });
  }
}

// What every product by panels shares: W, and tiles of `vectors` vectors of tokens.
struct PanelTiles {
  const PanelView& w;
  const MatmulKernels& m;
  const ProductKernels& kernel;
  std::size_t vectors;
  Epilogue epilogue;

  std::size_t wide() const { return vectors * m.lanes; }
  std::size_t row_blocks() const { return (w.rows + kRowBlock - 1) / kRowBlock; }
  std::size_t tile_floats() const { return w.depth_blocks * (w.depth + 1) * wide(); }
  std::size_t columns_of(std::size_t d) const { return std::min(w.depth, w.cols - d * w.depth); }
};

// x and y row-major, a row for each token.
struct LinearProduct : PanelTiles {
  const float* x;
  std::size_t tokens;
  float* y;

  LinearProduct(const PanelTiles& t, const float* from, std::size_t n, float* to)
      : PanelTiles(t), x(from), tokens(n), y(to) {}

  std::size_t tiles() const { return (tokens + wide() - 1) / wide(); }
  std::size_t tokens_of(std::size_t tile) const { return std::min(wide(), tokens - tile * wide()); }

  // Block d of a tile to its place in the packed tile.
  void pack(std::size_t tile, std::size_t d, float* packed) const {
    m.pack(x + tile * wide() * w.cols + d * w.depth, w.cols, tokens_of(tile), columns_of(d), w.depth, vectors,
           packed + d * (w.depth + 1) * wide());
  }
  void multiply(std::size_t tile, std::size_t row_block, const float* packed, float* sums) const {
    kernel.panel(w, row_block, packed, vectors, tokens_of(tile), sums, epilogue, y + tile * wide() * w.rows,
                 w.rows);
  }
};

// Images in, images out. A tile's tokens are positions of one output image, row by row at a pitch that lets
// every vector of them be read at once: the output's width rounded up to whole vectors where that fits the
// input's rows, else the length of those rows. Positions past the output's width are multiplied and thrown
// away.
struct ConvProduct : PanelTiles {
  const Conv2d& c;
  const float* x;  // images as `Padded` has them, or as they came
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

  // The last tile of an image takes no more vectors than it needs.
  std::size_t vectors_of(std::size_t first) const {
    const std::size_t needed = (positions - first + m.lanes - 1) / m.lanes;
    return std::min(vectors, needed <= 2 ? needed : std::size_t{4});
  }

  void pack(std::size_t tile, std::size_t d, float* packed) const {
    const std::size_t first = tile % tiles_per_image() * wide(), here = vectors_of(first);
    Source sources[4];
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
    std::array<Stretch, 64> stretches;  // at most one for each position
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

// Where there are tiles for all threads, each packs groups of its own, which stay in its L2 cache, and takes
// them through all row blocks: where cores do not share a cache, what another thread packed is slow to read.
// Few tiles: the threads pack them together and share the work, row block by row block. Either way the
// weights of a block are used for all tiles of a group while they are in the L2 cache.
constexpr std::size_t kGroupBytes = 400 << 10;

template <class Product>
void run(const Product& p, bool parallel) {
  const std::size_t tiles = p.tiles(), floats = p.tile_floats(), depth_blocks = p.w.depth_blocks;
  const auto multiply = [&](std::size_t tile, std::size_t row_block, const float* packed) {
    alignas(64) float sums[(kRowBlock + 1) * 4 * 16];
    p.multiply(tile, row_block, packed, sums);
  };
  const std::size_t workers = worker_count(tiles * p.row_blocks(), parallel);
  const std::size_t most = std::max<std::size_t>(1, kGroupBytes / (floats * sizeof(float)));
  const std::size_t group = std::clamp<std::size_t>(tiles / (4 * workers), 1, most);
  const std::size_t groups = (tiles + group - 1) / group;
  if (groups >= 2 * workers) {
    float* const packed = scratch<Purpose::tiles>(workers * group * floats);
    for_each_task(groups, workers, [&](std::size_t worker, std::size_t task) {
      float* const own = packed + worker * group * floats;
      const std::size_t first = task * group, here = std::min(group, tiles - first);
      for (std::size_t i = 0; i < here; ++i)
        for (std::size_t d = 0; d < depth_blocks; ++d) p.pack(first + i, d, own + i * floats);
      for (std::size_t r = 0; r < p.row_blocks(); ++r)
        for (std::size_t i = 0; i < here; ++i) multiply(first + i, r, own + i * floats);
    });
    return;
  }
  float* const packed = scratch<Purpose::tiles>(tiles * floats);
  const std::size_t parts = tiles * depth_blocks;
  const bool worth_it = tiles * p.wide() * p.w.cols >= kSerialBelow / 8;
  for_each_task(parts, std::min(workers, worker_count(parts, worth_it)), [&](std::size_t, std::size_t task) {
    p.pack(task / depth_blocks, task % depth_blocks, packed + task / depth_blocks * floats);
  });
  for_each_task(tiles * p.row_blocks(), workers, [&](std::size_t, std::size_t task) {
    multiply(task % tiles, task / tiles, packed + task % tiles * floats);
  });
}

// Where the planes of an image lie when it is copied with its padding: one plane for each channel and each
// phase of the strides, in which neighbouring outputs read neighbours.
struct Padded {
  const Conv2d& c;
  std::size_t rows, row_floats;

  explicit Padded(const Conv2d& conv)
      : c(conv),
        rows((c.height + 2 * c.pad_h + c.stride_h - 1) / c.stride_h),
        row_floats((c.width + 2 * c.pad_w + c.stride_w - 1) / c.stride_w) {}

  // Nothing to pad and nothing to part: images are read where they are.
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

void PackedMatrix::prepare(ProductKernel kernel, std::size_t tokens) const {
  if (kernel == ProductKernel::bitmask || rows_ == 0) return;
  panels(tile_shape(tokens, kernels().matmul.lanes, density()).depth);
}

PanelView PackedMatrix::panel_view(std::size_t depth) const {
  const Panels& p = panels(depth);
  return {rows_,
          cols_,
          p.depth,
          std::max<std::size_t>(1, (cols_ + p.depth - 1) / p.depth),
          p.shared,
          p.blocks.data(),
          p.headers.data(),
          p.offsets.as<std::uint16_t>(),
          p.values.as<char>()};
}

void PackedMatrix::linear(ProductKernel kernel, const float* x, std::size_t tokens, const float* bias,
                          const std::string& activation, float* y) const {
  const Epilogue epilogue{bias, activation_of(activation)};
  if (rows_ == 0 || tokens == 0) return;
  if (kernel == ProductKernel::bitmask) {
    bitmask_product(view(), dtype_, x, tokens, epilogue, y);
    return;
  }
  const MatmulKernels& m = kernels().matmul;  // asked once: use_isa() may be called meanwhile
  const TileShape shape = tile_shape(tokens, m.lanes, density());
  const PanelView w = panel_view(shape.depth);
  run(LinearProduct({w, m, kernels_for(m, dtype_), shape.vectors, epilogue}, x, tokens, y),
      tokens * nnz() >= kSerialBelow);
}

void PackedMatrix::linear(ProductKernel kernel, const std::uint16_t* x, std::size_t tokens, const float* bias,
                          const std::string& activation, std::uint16_t* y) const {
  const MatmulKernels& m = kernels().matmul;
  const auto convert = [](std::size_t n, auto&& part) {
    constexpr std::size_t kStep = 1 << 14;
    const std::size_t tasks = (n + kStep - 1) / kStep;
    for_each_task(tasks, worker_count(tasks, n >= kSerialBelow), [&](std::size_t, std::size_t task) {
      part(task * kStep, std::min(kStep, n - task * kStep));
    });
  };
  float* const from = scratch<Purpose::input>(tokens * cols_);
  float* const to = scratch<Purpose::output>(tokens * rows_);
  convert(tokens * cols_, [&](std::size_t i, std::size_t n) { m.widen(x + i, n, from + i); });
  linear(kernel, from, tokens, bias, activation, to);
  convert(tokens * rows_, [&](std::size_t i, std::size_t n) { m.narrow(to + i, n, y + i); });
}

void PackedMatrix::conv2d(const Conv2d& c, const float* x, std::size_t x_stride, std::size_t images,
                          const float* bias, const std::string& activation, float* y,
                          std::size_t y_stride) const {
  const Epilogue epilogue{bias, activation_of(activation)};
  if (rows_ == 0 || images == 0) return;
  const MatmulKernels& m = kernels().matmul;
  const TileShape shape = tile_shape(c.out_height() * c.out_width(), m.lanes, density());
  const PanelView w = panel_view(shape.depth);
  const PanelTiles tiles{w, m, kernels_for(m, dtype_), shape.vectors, epilogue};
  const Padded padded(c);
  const std::vector<std::uint32_t> columns = padded.columns();
  const bool parallel = images * c.out_height() * c.out_width() * nnz() >= kSerialBelow;
  if (padded.as_it_came()) {
    run(ConvProduct(tiles, c, x, x_stride, c.width, images, 0, columns.data(), y, y_stride), parallel);
    return;
  }
  const std::size_t floats = padded.image_floats(), planes = floats / c.channels, slack = 2 * m.lanes;
  const std::size_t step = std::max<std::size_t>(1, kImageBytes / (floats * sizeof(float)));
  float* const copies = scratch<Purpose::input>(std::min(step, images) * floats + padded.row_floats + slack);
  for (std::size_t first = 0; first < images; first += step) {
    const std::size_t here = std::min(step, images - first), tasks = here * c.channels;
    for_each_task(
        tasks, worker_count(tasks, here * floats >= kSerialBelow), [&](std::size_t, std::size_t task) {
          padded.copy(x + (first + task / c.channels) * x_stride + task % c.channels * c.height * c.width,
                      copies + task * planes);
        });
    run(ConvProduct(tiles, c, copies, floats, padded.row_floats, here, slack, columns.data(),
                    y + first * y_stride, y_stride),
        parallel);
  }
}

}  // namespace sparsam
