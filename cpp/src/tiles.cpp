#include "sparsam/tiles.hpp"

#include <cmath>

#include "chunks.hpp"
#include "sparsam/masks.hpp"

namespace sparsam {
namespace {

constexpr std::size_t kPiece = 4096;  // elements converted to double at a time: 32 KiB
constexpr std::size_t kLanes = 8;

// Magnitudes (norm 1) or squares (norm 2) of elements [start, start + n) in double.
void load_scores(const View& array, std::size_t start, std::size_t n, int norm, std::uint64_t* buffer,
                 double* to) {
  const std::uint64_t* bits = array.read(start, n, buffer);  // widened to float64 where it is not
  for (std::size_t i = 0; i < n; ++i) {
    const double d = std::fabs(bit_cast<double>(bits[i]));
    to[i] = norm == 1 ? d : d * d;
  }
}

struct LaneSum {
  double lane[kLanes] = {};

  // All but the last call for a run pass a multiple of kLanes.
  void add(const double* p, std::size_t n) {
    std::size_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
      for (std::size_t j = 0; j < kLanes; ++j) lane[j] += p[i + j];
    for (std::size_t j = 0; i + j < n; ++j) lane[j] += p[i + j];
  }
  double total() const {
    return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
  }
};

}  // namespace

void tile_scores(const View& array, const Tiling& t, int norm, double* scores) {
  if (array.size() == 0) return;
  const std::size_t down = t.down(), across = t.across();
  // A task is a row of tiles, or a part of one if tiles are tall and few.
  const std::size_t stretch = std::max<std::size_t>(1, kPiece / std::min(t.tile_cols, kPiece));
  const std::size_t stretches = (across + stretch - 1) / stretch;
  const std::size_t tasks = down * stretches;
  const std::size_t workers = worker_count(tasks, array.size() >= kSerialBelow);
  const Buffers<std::uint64_t> raw(workers, kPiece, true);
  const Buffers<double> pieces(workers, kPiece, true);
  for_each_task(tasks, workers, [&](std::size_t worker, std::size_t task) {
    const std::size_t tile_row = task / stretches, first = task % stretches * stretch;
    const std::size_t last = std::min(first + stretch, across);
    double* const sums = scores + tile_row * across;
    double* const piece = pieces.of(worker);
    std::fill(sums + first, sums + last, 0.0);
    const std::size_t row_end = std::min((tile_row + 1) * t.tile_rows, t.rows);
    for (std::size_t row = tile_row * t.tile_rows; row < row_end; ++row) {
      const std::size_t begin = first * t.tile_cols, end = std::min(last * t.tile_cols, t.cols);
      if (t.tile_cols > kPiece) {
        LaneSum sum;
        for (std::size_t c = begin; c < end; c += kPiece) {
          const std::size_t n = std::min(kPiece, end - c);
          load_scores(array, row * t.cols + c, n, norm, raw.of(worker), piece);
          sum.add(piece, n);
        }
        sums[first] += sum.total();
        continue;
      }
      load_scores(array, row * t.cols + begin, end - begin, norm, raw.of(worker), piece);
      for (std::size_t tile = first; tile < last; ++tile) {
        const std::size_t from = (tile - first) * t.tile_cols;
        LaneSum sum;
        sum.add(piece + from, std::min(t.tile_cols, end - begin - from));
        sums[tile] += sum.total();
      }
    }
  });
}

void expand_tiles(const std::uint64_t* tile_words, const Tiling& t, std::uint64_t* words) {
  std::fill(words, words + words_for(t.rows * t.cols), 0);
  const std::size_t across = t.across();
  const auto kept = [&](std::size_t tile) { return ((tile_words[tile / 64] >> (tile % 64)) & 1) != 0; };
  const auto set = [&](std::size_t from, std::size_t to) {
    for (; from < to && from % 64 != 0; ++from) words[from / 64] |= std::uint64_t{1} << (from % 64);
    for (; from + 64 <= to; from += 64) words[from / 64] = ~std::uint64_t{0};
    if (from < to) words[from / 64] |= (std::uint64_t{1} << (to - from)) - 1;
  };
  for (std::size_t row = 0; row < t.rows; ++row) {
    const std::size_t base = row / t.tile_rows * across;
    for (std::size_t tile = 0; tile < across;) {
      if (!kept(base + tile)) {
        ++tile;
        continue;
      }
      std::size_t end = tile + 1;  // kept neighbours are written together
      while (end < across && kept(base + end)) ++end;
      set(row * t.cols + tile * t.tile_cols, row * t.cols + std::min(end * t.tile_cols, t.cols));
      tile = end;
    }
  }
}

}  // namespace sparsam
