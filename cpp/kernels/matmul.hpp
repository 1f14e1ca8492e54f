// What the matmul kernels see of a packed matrix, and their row of the table. Plain data; no STL.
#pragma once
#include <cstddef>
#include <cstdint>

namespace sparsam {

enum class Activation : std::uint8_t { none, relu, gelu, gelu_tanh, silu };

// The canonical form. Row r: words [r * row_words, (r + 1) * row_words), values from row_start[r] on. The
// values are followed by 64 readable bytes.
struct BitmaskView {
  std::size_t rows, cols, row_words;
  const std::uint64_t* words;
  const std::uint64_t* row_start;
  const void* values;
};

// A block of the panel form: kRowBlock rows by `depth` columns. Its rows stand in units of four that have
// equally many entries, padded where they had not; see src/panels.cpp.
struct PanelBlock {
  std::uint32_t units;
  std::size_t header, offset, value;  // where its streams begin
};

constexpr std::size_t kRowBlock = 256;
constexpr std::size_t kUnitHeader =
    5;  // entries per row, then the four rows in the block (kRowBlock: no row)

struct PanelView {
  std::size_t rows, cols, depth, depth_blocks;
  bool shared;               // one offset serves all four rows of a unit
  const PanelBlock* blocks;  // [row block][depth block]
  const std::uint16_t* headers;
  const std::uint16_t* offsets;
  const void* values;
};

// What happens to a sum on its way out.
struct Epilogue {
  const float* bias;  // per row; may be null
  Activation activation;
};

// Tokens [from, from + count) of a tile, which go to y[row * y_stride + to] and onwards.
struct Stretch {
  std::size_t from, count, to;
};

// A vector of tokens as it lies in memory: `count` (at most a vector) neighbours, from `at` on.
struct Source {
  std::size_t at, count;
};

// Kernels for one type of values; sums are float32.
struct ProductKernels {
  // y[t * y_stride + r] for rows [begin, end) and tokens t < tokens (1 to 4). x[t * x_stride]: row_words * 64
  // floats, the ones past cols 0. A pruned weight multiplies nothing, whatever x holds.
  void (*bitmask)(const BitmaskView& w, std::size_t begin, std::size_t end, const float* x,
                  std::size_t x_stride, std::size_t tokens, Epilogue epilogue, float* y,
                  std::size_t y_stride);
  // y for one row block and one tile of tokens. sums: room for (kRowBlock + 1) * vectors * lanes floats,
  // 64-byte aligned. vectors is 1, 2 or 4; tokens <= vectors * lanes.
  void (*panel)(const PanelView& w, std::size_t row_block, const float* tile, std::size_t vectors,
                std::size_t tokens, float* sums, Epilogue epilogue, float* y, std::size_t y_stride);
  // The same for y with tokens side by side, as images have them: y[row * y_stride + token].
  void (*panel_across)(const PanelView& w, std::size_t row_block, const float* tile, std::size_t vectors,
                       float* sums, Epilogue epilogue, const Stretch* stretches, std::size_t n, float* y,
                       std::size_t y_stride);
};

struct MatmulKernels {
  std::size_t lanes;
  // One depth block of a tile: columns [0, n) of `tokens` rows of x, transposed to [depth + 1][vectors *
  // lanes] floats. Missing tokens and row `depth` become 0. tile is 64-byte aligned.
  void (*pack)(const float* x, std::size_t x_stride, std::size_t tokens, std::size_t n, std::size_t depth,
               std::size_t vectors, float* tile);
  // The same for x with tokens side by side: column k of the block starts at x[columns[k]], and vector v of
  // its tokens sources[v].at further on.
  void (*gather)(const float* x, const std::uint32_t* columns, std::size_t n, std::size_t depth,
                 const Source* sources, std::size_t vectors, float* tile);
  void (*widen)(const std::uint16_t* bfloats, std::size_t n, float* to);
  void (*narrow)(const float* from, std::size_t n, std::uint16_t* bfloats);  // to nearest, ties to even
  ProductKernels f32, bf16, f16;
};

}  // namespace sparsam
