// What the kernels for int4 values see of a packed weight. Plain data; no STL.
#pragma once
#include <cstddef>
#include <cstdint>

namespace sparsam {

// A value is one of 16 levels: code 0 is level 0 and stands in slots that are not used; the others rise, from
// -kInt8Most to kInt8Most. A level times the scale of its row and group of columns is the weight.
constexpr std::size_t kInt4Levels = 16;
// Columns of the window of a step.
constexpr std::size_t kInt4Window = 16;
// Scales are bfloat16 up to this, so that no sum of scaled levels leaves float32: 2^96 (255 * 64) 65536 <
// 2^127.
constexpr float kInt4Largest = 0x1p96f;

// The slots form of int4 values: as that of int8 (int8.hpp) but for windows of 16 columns on every machine,
// and in units of `lanes` rows by `width` columns, which share a scale for each row. A pair of steps is 4 *
// lanes bytes whose low half is the code of the first step's slot, and whose high half that of the second's;
// then as many bytes with offsets from the starts of both steps.
struct Int4View {
  std::size_t rows, cols, lanes, width;
  std::size_t per_window;      // steps for each 16 columns, where all units have as many; else 0
  const std::uint32_t* begin;  // first pair of each unit, and one past the last; unless per_window
  const std::uint32_t* row;    // of each lane; `rows` where there is none
  const float* zero;           // of each lane: its scaled sum where all bytes of x are 128
  const std::uint16_t* scale;  // of each lane of each unit, bfloat16
  const std::uint8_t* start;  // of each step, from the unit's first column; of one unit for all if per_window
  const std::uint8_t* codes;  // of each pair
  const std::int8_t* levels;  // kInt4Levels

  constexpr std::size_t units() const { return (cols + width - 1) / width; }  // of a group of rows
  // Pairs of the first `columns` columns of a group of rows, where per_window is given.
  constexpr std::size_t pairs_of(std::size_t columns) const {
    const std::size_t whole = columns / width * (width / kInt4Window * per_window / 2);
    return whole + ((columns % width + kInt4Window - 1) / kInt4Window * per_window + 1) / 2;
  }
  constexpr std::size_t first_pair(std::size_t group, std::size_t unit) const {
    if (per_window == 0) return begin[group * units() + unit];
    return group * pairs_of(cols) + pairs_of(unit * width < cols ? unit * width : cols);
  }
  constexpr const std::uint8_t* starts_of(std::size_t pair) const {
    return start + (per_window == 0 ? 2 * pair : 0);
  }
};

constexpr std::size_t int4_pair_bytes(std::size_t lanes) { return 8 * lanes; }

// The bitmask form of int4 values: groups of kInt4Rows rows, in order. A step is four columns, with a word
// for each half of the rows: bit 4 r + c says whether row r of the half has a weight in column c of the
// step. The codes of the first half are the low halves of bytes from the group's beginning on, in the order
// of the bits, step after step; those of the second half are the high ones of the same bytes.
constexpr std::size_t kInt4Rows = 32, kInt4Step = 4;

struct Int4BitmaskView {
  std::size_t rows, cols, width;
  const std::uint64_t* begin;  // first byte of codes of each group, and one past the last
  const float* zero;           // of each row, as above; 0 where a group has no row
  const std::uint16_t* scale;  // of each row of each unit of each group
  const std::uint64_t* words;  // two of each step of each group
  const std::uint8_t* codes;
  const std::int8_t* levels;

  constexpr std::size_t units() const { return (cols + width - 1) / width; }
  constexpr std::size_t steps() const { return (cols + kInt4Step - 1) / kInt4Step; }  // of a group
  constexpr std::size_t groups() const { return (rows + kInt4Rows - 1) / kInt4Rows; }
};

}  // namespace sparsam
