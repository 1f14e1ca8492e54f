#include "sparsam/attention.hpp"

#include <algorithm>
#include <stdexcept>

#include "attention.hpp"
#include "panel_tiles.hpp"
#include "sparsam/errors.hpp"
#include "sparsam/isa.hpp"
#include "sparsam/threads.hpp"
#include "table.hpp"

namespace sparsam {

void attention(const AttentionShape& shape, const HeadsView& q, const HeadsView& k, const HeadsView& v,
               const MaskView& mask, float scale, float* out) {
  if (shape.depth % kMaxLanes != 0)
    throw std::invalid_argument(expected("depth", shape.depth, "a multiple of 16", "pad the heads"));
  const std::size_t row = shape.heads * shape.depth, numbers = shape.sequences * shape.queries * row;
  if (numbers == 0) return;
  if (shape.keys == 0) {
    std::fill_n(out, numbers, 0.0f);
    return;
  }
  const auto attend = kernels().attention.attend;
  const std::size_t tasks = shape.sequences * shape.heads;
  const std::size_t workers = worker_count(tasks, 2 * numbers * shape.keys >= kSerialBelow);
  const std::size_t each = (shape.depth + kAttentionRows) * attention_width(shape.keys);
  const Scratch<Purpose::tiles> scratch(workers * each);
  float* const memory = scratch.data();  // of this thread
  for_each_task(tasks, workers, [&](std::size_t worker, std::size_t task) {
    const std::size_t s = task / shape.heads, h = task % shape.heads;
    const auto at = [&](const HeadsView& x) { return x.data + s * x.sequence_stride + h * x.head_stride; };
    const std::size_t masked = s * mask.sequence_stride + h * mask.head_stride;
    attend({shape.queries, shape.keys, shape.depth, scale, at(q), at(k), at(v), q.stride, k.stride, v.stride,
            mask.kept == nullptr ? nullptr : mask.kept + masked,
            mask.added == nullptr ? nullptr : mask.added + masked, mask.stride,
            out + s * shape.queries * row + h * shape.depth, row, memory + worker * each});
  });
}

}  // namespace sparsam
