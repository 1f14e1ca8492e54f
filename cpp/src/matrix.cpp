#include "sparsam/matrix.hpp"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <stdexcept>

#include "chunks.hpp"
#include "panels.hpp"
#include "sparsam/isa.hpp"
#include "sparsam/masks.hpp"
#include "table.hpp"

namespace sparsam {
namespace {

// Rows in stretches, shared out over threads.
struct RowTasks {
  std::size_t rows, step, tasks, workers;

  RowTasks(std::size_t n_rows, std::size_t cols)
      : rows(n_rows),
        step(std::max<std::size_t>(1, (std::size_t{1} << 16) / std::max<std::size_t>(cols, 1))),
        tasks((rows + step - 1) / step),
        workers(worker_count(tasks, rows * cols >= kSerialBelow)) {}

  template <class Body>
  void run(Body&& body) const {  // body(worker, row)
    for_each_task(tasks, workers, [&](std::size_t worker, std::size_t task) {
      for (std::size_t r = task * step; r < std::min(rows, (task + 1) * step); ++r) body(worker, r);
    });
  }
};

}  // namespace

PackedMatrix::PackedMatrix(const View& w, std::size_t rows, std::size_t cols)
    : rows_(rows),
      cols_(cols),
      row_words_(words_for(cols)),
      dtype_(w.dtype()),
      words_(8 * rows * row_words_) {
  with_bits(item_size(dtype_), [&](auto width) {
    using Bits = decltype(width);
    const auto& kernel = width_kernels<Bits>(kernels());
    const RowTasks all(rows, cols);
    const Buffers<Bits> buffers(all.workers, cols, !w.contiguous());
    all.run([&](std::size_t worker, std::size_t r) {
      const Bits* src = w.read(r * cols, cols, buffers.of(worker));
      kernel.mark(src, cols, 0, 0, words_.as<std::uint64_t>() + r * row_words_, static_cast<Bits*>(nullptr));
    });
    index_rows();
    values_ = Memory::readable_past(nnz() * item_size(dtype_));
    all.run([&](std::size_t worker, std::size_t r) {
      const Bits* src = w.read(r * cols, cols, buffers.of(worker));
      Bits* to = values_.as<Bits>() + row_start_[r];
      for (std::size_t k = 0; k < row_words_; ++k)
        for (std::uint64_t bits = words_.as<std::uint64_t>()[r * row_words_ + k]; bits != 0; bits &= bits - 1)
          *to++ = src[k * 64 + static_cast<std::size_t>(__builtin_ctzll(bits))];
    });
  });
}

PackedMatrix::PackedMatrix(std::size_t rows, std::size_t cols, const std::uint8_t* bits, const View& values)
    : rows_(rows),
      cols_(cols),
      row_words_(words_for(cols)),
      dtype_(values.dtype()),
      words_(8 * rows * row_words_) {
  const std::size_t row_bytes = (cols + 7) / 8;
  for (std::size_t r = 0; r < rows && row_bytes > 0; ++r) {
    words_.as<std::uint64_t>()[(r + 1) * row_words_ - 1] = 0;
    std::memcpy(words_.as<std::uint64_t>() + r * row_words_, bits + r * row_bytes, row_bytes);
    if (cols % 64 != 0 && words_.as<std::uint64_t>()[(r + 1) * row_words_ - 1] >> cols % 64 != 0)
      throw std::invalid_argument("row " + std::to_string(r) + ": bits past the last column are set");
  }
  index_rows();
  if (nnz() != values.size())
    throw std::invalid_argument(std::to_string(values.size()) + " values for " + std::to_string(nnz()) +
                                " bits that are set");
  values_ = Memory::readable_past(nnz() * item_size(dtype_));
  with_bits(item_size(dtype_), [&](auto width) {
    using Bits = decltype(width);
    Bits* own = values_.as<Bits>();
    const Bits* from = values.read(0, values.size(), own);
    if (from != own && nnz() > 0) std::memcpy(own, from, nnz() * sizeof(Bits));
  });
}

PackedMatrix::~PackedMatrix() = default;

BitmaskView PackedMatrix::view() const {
  return {rows_, cols_, row_words_, words_.as<std::uint64_t>(), row_start_.data(), values_.as<char>()};
}

void PackedMatrix::index_rows() {
  row_start_.assign(rows_ + 1, 0);
  shared_rows_ = rows_ > 0 && rows_ % 4 == 0 ? 4 : 0;
  for (std::size_t r = 0; r < rows_; ++r) {
    const std::uint64_t* words = words_.as<std::uint64_t>() + r * row_words_;
    std::uint64_t n = 0;
    for (std::size_t k = 0; k < row_words_; ++k)
      n += static_cast<std::uint64_t>(__builtin_popcountll(words[k]));
    row_start_[r + 1] = row_start_[r] + n;
    if (shared_rows_ != 0 && r % 4 != 0 && !std::equal(words, words + row_words_, words - row_words_))
      shared_rows_ = 0;
  }
}

double PackedMatrix::density() const {
  if (rows_ == 0 || cols_ == 0) return 0.0;
  return static_cast<double>(nnz()) / (static_cast<double>(rows_) * static_cast<double>(cols_));
}

std::size_t PackedMatrix::bytes() const { return words_.bytes() + 8 * row_start_.size() + values_.bytes(); }

std::size_t PackedMatrix::panel_bytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::size_t n = 0;
  for (const auto& p : panels_) n += p->bytes();
  return n;
}

void PackedMatrix::bits(std::uint8_t* to) const {
  const std::size_t row_bytes = (cols_ + 7) / 8;
  for (std::size_t r = 0; r < rows_ && row_bytes > 0; ++r)
    std::memcpy(to + r * row_bytes, words_.as<std::uint64_t>() + r * row_words_, row_bytes);
}

void PackedMatrix::unpack(void* to) const {
  with_bits(item_size(dtype_), [&](auto width) {
    using Bits = decltype(width);
    RowTasks(rows_, cols_).run([&](std::size_t, std::size_t r) {
      Bits* row = static_cast<Bits*>(to) + r * cols_;
      const Bits* from = values_.as<Bits>() + row_start_[r];
      std::fill(row, row + cols_, Bits{0});
      for (std::size_t k = 0; k < row_words_; ++k)
        for (std::uint64_t bits = words_.as<std::uint64_t>()[r * row_words_ + k]; bits != 0; bits &= bits - 1)
          row[k * 64 + static_cast<std::size_t>(__builtin_ctzll(bits))] = *from++;
    });
  });
}

const Panels& PackedMatrix::panels(std::size_t depth) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& p : panels_)
    if (p->depth == depth) return *p;
  panels_.push_back(
      std::make_unique<Panels>(build_panels(view(), item_size(dtype_), depth, shared_rows_ == 4)));
  return *panels_.back();
}

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

// Memory that a thread keeps between its calls.
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
      float* padded = scratch(here * x_stride);
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

// A product with panels, in tiles of tokens. Many tiles: each thread packs a group of its own, which stays in
// its L2 cache, and takes it through all row blocks. Few: the threads pack all tiles together and then share
// the work, row block by row block. Either way the weights of a block are used for several tiles while they
// are in the L2 cache.
constexpr std::size_t kGroupBytes = 400 << 10;

struct PanelProduct {
  const PanelView& w;
  const MatmulKernels& m;
  const ProductKernels& kernel;
  std::size_t vectors;
  const float* x;
  std::size_t tokens;
  Epilogue epilogue;
  float* y;

  std::size_t wide() const { return vectors * m.lanes; }
  std::size_t tiles() const { return (tokens + wide() - 1) / wide(); }
  std::size_t row_blocks() const { return (w.rows + kRowBlock - 1) / kRowBlock; }
  std::size_t part_floats() const { return (w.depth + 1) * wide(); }
  std::size_t tile_floats() const { return w.depth_blocks * part_floats(); }
  std::size_t tokens_of(std::size_t tile) const { return std::min(wide(), tokens - tile * wide()); }

  void pack(std::size_t tile, std::size_t d, float* to) const {
    const std::size_t first = d * w.depth;
    m.pack(x + tile * wide() * w.cols + first, w.cols, tokens_of(tile), std::min(w.depth, w.cols - first),
           w.depth, vectors, to + d * part_floats());
  }
  void multiply(std::size_t tile, std::size_t row_block, const float* packed) const {
    alignas(64) float sums[(kRowBlock + 1) * 4 * 16];
    kernel.panel(w, row_block, packed, vectors, tokens_of(tile), sums, epilogue, y + tile * wide() * w.rows,
                 w.rows);
  }

  void run(bool parallel) const {
    const std::size_t workers = worker_count(tiles() * row_blocks(), parallel);
    const std::size_t group = std::max<std::size_t>(1, kGroupBytes / (tile_floats() * sizeof(float)));
    const std::size_t groups = (tiles() + group - 1) / group;
    if (groups >= 4 * workers) {
      float* const packed = scratch(workers * group * tile_floats());
      for_each_task(groups, workers, [&](std::size_t worker, std::size_t task) {
        float* const own = packed + worker * group * tile_floats();
        const std::size_t first = task * group, here = std::min(group, tiles() - first);
        for (std::size_t i = 0; i < here; ++i)
          for (std::size_t d = 0; d < w.depth_blocks; ++d) pack(first + i, d, own + i * tile_floats());
        for (std::size_t r = 0; r < row_blocks(); ++r)
          for (std::size_t i = 0; i < here; ++i) multiply(first + i, r, own + i * tile_floats());
      });
      return;
    }
    float* const packed = scratch(tiles() * tile_floats());
    const std::size_t parts = tiles() * w.depth_blocks;
    const bool worth_it = tokens * w.cols >= kSerialBelow / 8;
    for_each_task(parts, std::min(workers, worker_count(parts, worth_it)),
                  [&](std::size_t, std::size_t task) {
                    const std::size_t tile = task / w.depth_blocks;
                    pack(tile, task % w.depth_blocks, packed + tile * tile_floats());
                  });
    for_each_task(tiles() * row_blocks(), workers, [&](std::size_t, std::size_t task) {
      const std::size_t tile = task % tiles();
      multiply(tile, task / tiles(), packed + tile * tile_floats());
    });
  }
};

}  // namespace

void PackedMatrix::prepare(ProductKernel kernel, std::size_t tokens) const {
  if (kernel == ProductKernel::bitmask || rows_ == 0) return;
  panels(tile_shape(tokens, kernels().matmul.lanes, density()).depth);
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
  const Panels& p = panels(shape.depth);
  const PanelView w{rows_,
                    cols_,
                    p.depth,
                    std::max<std::size_t>(1, (cols_ + p.depth - 1) / p.depth),
                    p.shared,
                    p.blocks.data(),
                    p.headers.data(),
                    p.offsets.as<std::uint16_t>(),
                    p.values.as<char>()};
  PanelProduct{w, m, kernels_for(m, dtype_), shape.vectors, x, tokens, epilogue, y}.run(tokens * nnz() >=
                                                                                        kSerialBelow);
}

}  // namespace sparsam
