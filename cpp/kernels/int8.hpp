// What the kernels for int8 values see of a packed weight, and their row. Plain data; no STL.
#pragma once
#include <cstddef>
#include <cstdint>

#include "int4.hpp"
#include "matmul.hpp"

namespace sparsam {

// Rows of x that one pass over the weights multiplies.
constexpr std::size_t kInt8Batch = 8;
// Behind each row of x so many bytes may be read: windows reach past the last column.
constexpr std::size_t kInt8Slack = 64;
// Values are at most so large: 255 (64 + 64) fits int16, so that a sum of two products does not saturate
// where an instruction adds up neighbours in 16 bits (vpmaddubsw).
constexpr int kInt8Most = 64;
// As are those that are added up there before they are widened: positive ones may sum to so much, and
// negative ones to its opposite, since 255 * 128 fits.
constexpr int kInt8Narrow = 128;
// Sums stay below 2^31: 127 * 64 * 65536 < 2^30. Columns fit 16 bits.
constexpr std::size_t kInt8Columns = 65536;
// The zero of x: its bytes are 128 + round(x / scale).
constexpr std::int32_t kInt8Zero = 128;

// The slots form of int8 values. Rows stand in groups of `lanes`. A step gives rows of a group four slots
// each, for weights whose columns lie in a window of `window` neighbouring ones; an unused slot has value 0.
// Steps come in pairs:
//   window 16: int8 values[2][4 * lanes], then 4 * lanes bytes whose low half is the offset from the first
//     step's start, and whose high half the one from the second's. Both steps are of all rows. The first
//     pairs of a group are narrow: what each row sums in the first two slots of both steps fits int16
//     (kInt8Narrow), and so does what it sums in the last two.
//   window 64: int8 values[4 * lanes], uint8 offsets[4 * lanes]. The first step is of the first half of the
//     rows, the second of the other half, and both share one start.
struct Int8View {
  std::size_t rows, cols, lanes, window;
  const std::uint64_t* begin;  // first pair of each group, and one past the last
  const std::uint64_t* wide;   // first pair of each group that is not narrow; null with windows of 64
  const std::uint32_t* row;    // of each lane; `rows` where there is none
  const std::int32_t* first;   // of each lane: -128 times the sum of its row's values
  const float* scale;          // of each lane
  const std::uint16_t* start;  // of each step, or of each pair
  const std::uint8_t* codes;   // of each pair
};

constexpr std::size_t int8_pair_starts(std::size_t window) { return window == 16 ? 2 : 1; }
// With each start every row has four slots.
constexpr std::size_t int8_pair_slots(std::size_t lanes, std::size_t window) {
  return 4 * lanes * int8_pair_starts(window);
}
constexpr std::size_t int8_pair_bytes(std::size_t lanes, std::size_t window) {
  return int8_pair_slots(lanes, window) + 4 * lanes;
}

// *Quads* multiply many rows of x by weights that leave most slots unused: groups of four weights of one row
// of W, with rows of x in the lanes, so that it does not matter where the weights stand. kQuadGroups groups
// of rows have their weights taken out of slots at a time, into memory of quad_bytes(); their columns, times
// kQuadStep, fit uint16.
constexpr std::size_t kQuadGroups = 8, kQuadStep = 4;
constexpr std::size_t quad_bytes(std::size_t pairs, std::size_t lanes, std::size_t tile) {
  return kQuadGroups * lanes * (sizeof(std::int32_t) * tile + 3 * 8) + 3 * 8 * lanes * pairs + 64;
}

// Kernels for slots of one geometry; the generic row takes any. Products of one row of x and one of W are
// exact sums of integers, and what follows is one sequence of float32 operations, so that all rows give the
// same bits:  y = float(sum) * (w.scale * x_scale) + bias, each operation rounded, then the activation.
struct Int8Kernels {
  const char* name;
  std::uint32_t required;  // bits of Feature
  std::size_t lanes, window;
  // n numbers of x, float32 or bfloat16, to bytes 128 + round(x / scale), to nearest, ties to even. Returns
  // scale = max|x| / 127; NaN where x is not finite; 0 where max|x| < 2^-96, and then all bytes are 128.
  float (*quantise)(const void* x, bool narrow, std::size_t n, std::uint8_t* to);
  // The same in two steps, for numbers in several places: the bits of the largest magnitude, of which several
  // are compared as integers, and the rounding of n of the numbers, given the largest of all. 0 for no
  // numbers.
  std::uint32_t (*largest)(const float* x, std::size_t n);
  float (*round)(const float* x, std::size_t n, std::uint32_t largest, std::uint8_t* to);
  // Groups [begin, end) of `batch` (1 to kInt8Batch) rows of y. By reference: a copy would read in one piece
  // what was just written in several, and wait until all stores before it have left.
  void (*multiply)(const Int8View& w, std::size_t begin, std::size_t end, const std::uint8_t* x,
                   std::size_t x_stride, const float* x_scale, std::size_t batch, const Epilogue& epilogue,
                   const Output& y);
  // The same of int4 values in slots of `int4_lanes` rows (the generic row: of any number), or null where the
  // generic row serves. Sums of a unit are
  // exact; in float32, without fused operations, from the first unit to the last,
  //   total = total + float(sum) * scale;    y = (total - zero) * x_scale + bias, then the activation.
  std::size_t int4_lanes;
  void (*multiply_int4)(const Int4View& w, std::size_t begin, std::size_t end, const std::uint8_t* x,
                        std::size_t x_stride, const float* x_scale, std::size_t batch,
                        const Epilogue& epilogue, const Output& y);
  // The same of the bitmask form, or null where the generic row serves.
  void (*multiply_int4_bitmask)(const Int4BitmaskView& w, std::size_t begin, std::size_t end,
                                const std::uint8_t* x, std::size_t x_stride, const float* x_scale,
                                std::size_t batch, const Epilogue& epilogue, const Output& y);
  // Rows of x in a tile of quads, or 0 where there are none. A tile has cols * tile bytes: for each column
  // those of its rows, in an order that is the kernel's own.
  std::size_t tile;
  // A tile of `count` (1 to `tile`) rows of x, as `quantise` left them, readable past their ends as above.
  void (*make_tile)(const std::uint8_t* x, std::size_t x_stride, std::size_t count, std::size_t cols,
                    std::uint8_t* to);
  // As `multiply`, of groups [begin, end), at most kQuadGroups, with slots for 16 columns, and of `batch`
  // rows of y, tile after tile; (w.cols - 1) * kQuadStep fits uint16. `room`: quad_bytes() of the pairs of
  // these groups, at a multiple of 64.
  void (*multiply_quads)(const Int8View& w, std::size_t begin, std::size_t end, const std::uint8_t* tiles,
                         const float* x_scale, std::size_t batch, void* room, const Epilogue& epilogue,
                         const Output& y);
};

}  // namespace sparsam
