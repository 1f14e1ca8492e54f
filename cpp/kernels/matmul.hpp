// Views of packed weights for the matmul kernels, and the table of these kernels. Plain data; no STL.
#pragma once
#include <cstddef>
#include <cstdint>

namespace sparsam {

enum class Activation : std::uint8_t { none, relu, gelu, gelu_tanh, silu };

// Limits of every row: lanes of a vector of floats, and vectors of a tile.
constexpr std::size_t kMaxLanes = 16, kMaxVectors = 4;

// The bitmask form. Row r: words [r * row_words, (r + 1) * row_words), values from row_start[r] on. The
// values are followed by 64 readable bytes.
struct BitmaskView {
  std::size_t rows, cols, row_words;
  const std::uint64_t* words;
  const std::uint64_t* row_start;
  const void* values;
};

// The panel form: blocks of kRowBlock rows by `depth` columns. In a block the rows are sorted by their number
// of entries and form units of four; a row with fewer entries than the longest of its unit is padded with
// weight 0 at column `depth`, which is 0 in every tile, so that padding adds 0 * 0 whatever x contains.
// Column numbers count from the block's first. Each step of a unit has four of them (one where the four rows
// share their columns) and four weights, side by side. The first blocks of a row of blocks have a unit for
// every row, the others only for rows with entries.
struct PanelBlock {
  std::uint64_t unit, step;  // of the whole form, where its own begin; they end where the next block's begin
};

constexpr std::size_t kRowBlock = 256;
constexpr std::size_t kUnitHeader = 5;  // steps, then the four rows in the block (kRowBlock: no row)
constexpr std::size_t kMaxDepth = 256;

struct PanelView {
  std::size_t rows, cols, depth, depth_blocks;
  bool shared;               // one offset serves all four rows of a unit
  const PanelBlock* blocks;  // [row block][depth block], and one past the last
  const std::uint16_t* headers;
  const void* offsets;  // of one byte each where depth < 256, else of two
  const void* values;
};

// The form in slots: blocks of kSlotBlock rows, sorted in a block by their number of entries, in groups of
// `depth` rows (8 or 16), whose sums are in the lanes of a vector. A step of a group has a slot for each row:
// an entry in one of the `depth` columns from its start on, or none. Values are stored step after step: those
// of used slots, or in a form that is `full` of all slots, 0 where there is no entry. 64 readable bytes
// follow.
struct SlotStart {
  std::uint64_t step, value;  // of the whole form, where its own begin; they end where the next group's begin
};

constexpr std::size_t kSlotBlock = 64, kMaxSlotRows = 16;
constexpr std::size_t kSlotBatch = 8;  // rows of x at a time

struct SlotView {
  std::size_t rows, cols, depth;
  bool full;
  const SlotStart* groups;     // and one past the last
  const std::uint8_t* order;   // of each group `depth` rows in the block (kSlotBlock: no row)
  const void* words;           // a step's columns, counted from its start: see slots-inl.hpp
  const std::uint16_t* used;   // of 16 slots; those of 8 are in their word
  const std::uint8_t* starts;  // columns from the start of the step before, or from column 0
  const void* values;
};

// What is done to a sum before it is stored.
struct Epilogue {
  const float* bias;  // per row; may be null
  Activation activation;
};

// Rows of x or y, `stride` elements from one to the next: float32, or bfloat16 where `narrow`.
struct Input {
  const void* data;
  std::size_t stride;
  bool narrow;
};
struct Output {
  void* data;
  std::size_t stride;
  bool narrow;
};

// Columns [from, from + count) of a tile's sums, which go to y[row * y_stride + to] and onwards.
struct Stretch {
  std::size_t from, count, to;
};

// A vector of positions as it lies in memory: `count` (at most a vector) neighbours, from `at` on.
struct Source {
  std::size_t at, count;
};

// Kernels for one type of values; sums are float32.
struct ValueKernels {
  // Columns [begin, end) of `batch` (1 to 4) rows of y. x[t * x_stride]: row_words * 64 floats, the ones past
  // cols 0. A pruned weight multiplies nothing, whatever x holds.
  void (*bitmask)(const BitmaskView& w, std::size_t begin, std::size_t end, const float* x,
                  std::size_t x_stride, std::size_t batch, Epilogue epilogue, Output y);
  // y for one row block and one tile. sums: room for (kRowBlock + 1) * vectors * lanes floats, 64-byte
  // aligned. vectors is 1, 2 or 4; batch <= vectors * lanes.
  void (*panel)(const PanelView& w, std::size_t row_block, const float* tile, std::size_t vectors,
                std::size_t batch, float* sums, Epilogue epilogue, Output y);
  // The same for y with positions side by side, as images have them: y[row * y_stride + position].
  void (*panel_across)(const PanelView& w, std::size_t row_block, const float* tile, std::size_t vectors,
                       float* sums, Epilogue epilogue, const Stretch* stretches, std::size_t n, float* y,
                       std::size_t y_stride);
  // The columns of y of one block, for `batch` (1 to kSlotBatch) rows of x, of which max(cols, depth) floats
  // may be read, and whether all of these are `finite`. A pruned weight multiplies nothing, whatever x holds.
  void (*slots)(const SlotView& w, std::size_t block, const float* x, std::size_t x_stride, std::size_t batch,
                bool finite, Epilogue epilogue, Output y);
};

struct MatmulKernels {
  std::size_t lanes;  // also the depth of slots that is fastest with this instruction set
  // One depth block of a tile: n columns of `batch` rows of x, transposed to [depth + 1][vectors * lanes]
  // floats. Missing rows and column `depth` become 0. tile is 64-byte aligned.
  void (*pack)(Input x, std::size_t batch, std::size_t n, std::size_t depth, std::size_t vectors,
               float* tile);
  // The same for x with positions side by side: column k of the block starts at x[columns[k]], and vector v
  // of its positions sources[v].at further on.
  void (*gather)(const float* x, const std::uint32_t* columns, std::size_t n, std::size_t depth,
                 const Source* sources, std::size_t vectors, float* tile);
  void (*widen)(const std::uint16_t* bfloats, std::size_t n, float* to);
  ValueKernels f32, bf16, f16;
};

}  // namespace sparsam
