// The panel form, derived from the bitmask for products with several tokens.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "matmul.hpp"
#include "sparsam/memory.hpp"

namespace sparsam {

// Blocks of kRowBlock rows by `depth` columns. In a block the rows are sorted by their number of entries and
// put into units of four; a row with fewer entries than the longest of its unit is padded with weight 0 at
// column `depth`, which tiles hold as 0, so the padding adds 0 * 0 whatever x holds. Column numbers count
// from the block's first; for each step of a unit there are four of them (one where the four rows share their
// columns) and four weights, side by side.
struct Panels {
  std::size_t depth;
  bool shared;
  std::vector<PanelBlock> blocks;
  std::vector<std::uint16_t> headers;
  Memory offsets, values;

  std::size_t bytes() const {
    return blocks.size() * sizeof(PanelBlock) + 2 * headers.size() + offsets.bytes() + values.bytes();
  }
};

// depth is a multiple of 64, at most 32768.
Panels build_panels(const BitmaskView& w, std::size_t value_bytes, std::size_t depth, bool shared);

}  // namespace sparsam
