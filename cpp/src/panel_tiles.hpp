// Products by panels, in tiles: the common part of linear layers and convolutions.
#pragma once
#include <algorithm>
#include <cstddef>
#include <string>

#include "chunks.hpp"
#include "matmul.hpp"
#include "sparsam/matmul.hpp"
#include "sparsam/memory.hpp"

namespace sparsam {

Activation activation_of(const std::string& name);
const ValueKernels& kernels_for(const MatmulKernels& m, DType dtype);

// How many vectors a tile has for a batch (or the positions of an image): its part for one block, 16 or 32
// KiB, stays in the L1 cache while weights stream through. Four rows of four vectors fill half of AVX-512's
// registers; the other rows have 16 registers and take two.
std::size_t tile_vectors(std::size_t batch, const MatmulKernels& m, const PanelView& w);

// Memory that a thread keeps between calls, one block for each purpose; large blocks are freed.
enum class Purpose { tiles, images };

template <Purpose>
class Scratch {
 public:
  explicit Scratch(std::size_t floats) {
    const std::size_t bytes = floats * sizeof(float);
    if (memory_.bytes() >= bytes) return;
    memory_ = Memory();  // free before allocating
    memory_ = Memory(bytes);
  }
  ~Scratch() {
    if (memory_.bytes() > kKept) memory_ = Memory();
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  float* data() const { return memory_.as<float>(); }

 private:
  static constexpr std::size_t kKept = std::size_t{8} << 20;

  static Memory& kept() {  // no member: GCC for Windows defines its initialisation once in each file
    static thread_local Memory memory;
    return memory;
  }

  Memory& memory_ = kept();
};

// The common members of products by panels: W, and tiles of `vectors` vectors.
struct PanelTiles {
  const PanelView& w;
  const MatmulKernels& m;
  const ValueKernels& kernel;
  std::size_t vectors;
  Epilogue epilogue;

  std::size_t wide() const { return vectors * m.lanes; }
  std::size_t row_blocks() const { return (w.rows + kRowBlock - 1) / kRowBlock; }
  std::size_t tile_floats() const { return w.depth_blocks * (w.depth + 1) * wide(); }
  std::size_t columns_of(std::size_t d) const { return std::min(w.depth, w.cols - d * w.depth); }
};

// If there are tiles for all threads, each thread packs groups of its own, which stay in its L2 cache, and
// multiplies them with all row blocks: without a shared cache, reading what another thread packed is slow. If
// there are few tiles, the threads pack them together and divide the row blocks. In both cases the weights of
// a block are used for all tiles of a group while they are in the L2 cache.
//
// Product: PanelTiles with tiles(), pack(tile, depth block, packed tile) and multiply(tile, row block, packed
// tile, sums).
template <class Product>
void run_tiles(const Product& p, bool parallel) {
  constexpr std::size_t kGroupBytes = 400 << 10;
  const std::size_t tiles = p.tiles(), floats = p.tile_floats(), depth_blocks = p.w.depth_blocks;
  const auto multiply = [&](std::size_t tile, std::size_t row_block, const float* packed) {
    alignas(64) float sums[(kRowBlock + 1) * kMaxVectors * kMaxLanes];
    p.multiply(tile, row_block, packed, sums);
  };
  const std::size_t workers = worker_count(tiles * p.row_blocks(), parallel);
  const std::size_t most = std::max<std::size_t>(1, kGroupBytes / (floats * sizeof(float)));
  const std::size_t group = std::clamp<std::size_t>(tiles / (4 * workers), 1, most);
  const std::size_t groups = (tiles + group - 1) / group;
  if (groups >= 2 * workers) {
    const Scratch<Purpose::tiles> packed(workers * group * floats);
    for_each_task(groups, workers, [&, data = packed.data()](std::size_t worker, std::size_t task) {
      float* const own = data + worker * group * floats;
      const std::size_t first = task * group, here = std::min(group, tiles - first);
      for (std::size_t i = 0; i < here; ++i)
        for (std::size_t d = 0; d < depth_blocks; ++d) p.pack(first + i, d, own + i * floats);
      for (std::size_t r = 0; r < p.row_blocks(); ++r)
        for (std::size_t i = 0; i < here; ++i) multiply(first + i, r, own + i * floats);
    });
    return;
  }
  const Scratch<Purpose::tiles> scratch(tiles * floats);
  float* const packed = scratch.data();
  const std::size_t parts = tiles * depth_blocks;
  const bool worth_it = tiles * p.wide() * p.w.cols >= kSerialBelow / 8;
  for_each_task(parts, std::min(workers, worker_count(parts, worth_it)), [&](std::size_t, std::size_t task) {
    p.pack(task / depth_blocks, task % depth_blocks, packed + task / depth_blocks * floats);
  });
  for_each_task(tiles * p.row_blocks(), workers, [&](std::size_t, std::size_t task) {
    multiply(task % tiles, task / tiles, packed + task % tiles * floats);
  });
}

}  // namespace sparsam
