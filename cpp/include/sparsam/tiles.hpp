// Groups of weights that are kept or pruned together, as tiles of a matrix: both Block and Slices are such
// groups.
#pragma once
#include <cstddef>
#include <cstdint>

#include "sparsam/views.hpp"

namespace sparsam {

// A rows x cols matrix (the array in C order) cut into tiles of tile_rows x tile_cols; those at the far edges
// may be smaller.
struct Tiling {
  std::size_t rows, cols, tile_rows, tile_cols;
  std::size_t down() const { return (rows + tile_rows - 1) / tile_rows; }
  std::size_t across() const { return (cols + tile_cols - 1) / tile_cols; }
};

// scores[down * across]: the sum of |w| (norm 1) or w * w (norm 2) of each tile, in double. The order of
// summation is fixed (rows in turn; in a row, eight interleaved partial sums), so the result is the same on
// every machine.
void tile_scores(const View& array, const Tiling& tiling, int norm, double* scores);

// Repeats the bit of each tile for all of its elements: words for rows * cols elements.
void expand_tiles(const std::uint64_t* tile_words, const Tiling& tiling, std::uint64_t* words);

}  // namespace sparsam
