// How the entries of a group of rows are distributed over the steps of a form in slots, for all types of
// values.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace sparsam {

// A step looks at `window` neighbouring columns, and has `slots` slots for entries of each row.
struct SlotShape {
  std::size_t rows, slots, window;
  std::size_t gap;  // the most columns from the start of a step to that of the next; 0 for any number
};

// The columns of a row's entries, in rising order, of which the steps take one after the other.
struct SlotRow {
  const std::uint32_t* next;
  const std::uint32_t* end;
};

// Distributes the entries of at most shape.rows rows over steps, in order, as visit(start, taken): the next
// taken[r] entries of row r lie in the columns [start, start + window), which lie in [0, cols) if cols is at
// least the window. Each window begins at the first column that any of the rows still needs, or at the last
// one that has room, and each row takes as many entries as fit. Starts never decrease. A step may be empty,
// to bridge a gap.
template <class Visit>
void for_each_step(const SlotShape& shape, SlotRow* rows, std::size_t n_rows, std::size_t cols,
                   Visit&& visit) {
  constexpr std::size_t kMaxRows = 64;
  std::uint8_t taken[kMaxRows] = {};
  const std::size_t last = cols < shape.window ? 0 : cols - shape.window;
  for (std::size_t before = 0;;) {
    std::size_t first = cols;
    for (std::size_t r = 0; r < n_rows; ++r)
      if (rows[r].next != rows[r].end) first = std::min<std::size_t>(first, *rows[r].next);
    if (first == cols) return;
    std::size_t start = std::min(first, last);
    if (shape.gap != 0) start = std::min(start, before + shape.gap);
    for (std::size_t r = 0; r < n_rows; ++r) {
      const std::uint32_t* const from = rows[r].next;
      while (rows[r].next != rows[r].end && static_cast<std::size_t>(rows[r].next - from) < shape.slots &&
             *rows[r].next < start + shape.window)
        ++rows[r].next;
      taken[r] = static_cast<std::uint8_t>(rows[r].next - from);
    }
    visit(start, static_cast<const std::uint8_t*>(taken));
    before = start;
  }
}

}  // namespace sparsam
