#include "int8_quads.hpp"

#include <algorithm>
#include <atomic>

#include "forms.hpp"
#include "sparsam/isa.hpp"
#include "sparsam/matmul.hpp"
#include "sparsam/memory.hpp"
#include "sparsam/threads.hpp"
#include "table.hpp"

namespace sparsam {
namespace {

// About the clocks that parts of a product take, fitted on a Zen 5: a pair of steps for a row of x; for each
// tile four weights, and a row of W; taking the weights of a pair out of slots; another round of tasks.
constexpr double kPair = 2.1, kQuad = 6, kRow = 20, kTaken = 28, kCall = 8000;

enum class Use { where_faster, always, never };
std::atomic<Use> use{Use::where_faster};

}  // namespace

Int8Quads::Int8Quads(const Form& form, const Int8Kernels& kernel, std::size_t batch)
    : w_(), kernel_(kernel), groups_(0) {
  const std::size_t tile = kernel.tile;
  const Use wanted = use.load(std::memory_order_relaxed);
  if (form.dtype() != DType::i8 || tile == 0 || wanted == Use::never) return;
  w_ = form.int8_slots();
  if (form.nnz() == 0 || (w_.cols - 1) * kQuadStep > UINT16_MAX) return;
  const auto pairs = static_cast<double>(form.header().steps), rows = static_cast<double>(w_.rows);
  const double of_tile = kQuad * (static_cast<double>(form.nnz()) / 4 + rows / 2) + kRow * rows;
  const std::size_t rest = batch % tile;
  const auto of_slots = [&](std::size_t n) { return kPair * pairs * static_cast<double>(n); };
  const bool whole = rest != 0 && (wanted == Use::always || of_slots(rest) > of_tile);
  tiles_ = batch / tile + (whole ? 1 : 0);
  rows_ = whole ? batch : batch - rest;
  const double of_quads = static_cast<double>(tiles_) * of_tile + kTaken * pairs + kCall;
  if (wanted != Use::always && of_slots(rows_) <= of_quads) rows_ = 0;
  if (rows_ == 0) return;
  groups_ = (w_.rows + w_.lanes - 1) / w_.lanes;
  workers_ = worker_count(groups_, form.nnz() * rows_ >= kSerialBelow);
  step_ = std::clamp<std::size_t>(groups_ / (4 * workers_), 1, kQuadGroups);
  blocks_ = (groups_ + step_ - 1) / step_;
  for (std::size_t block = 0; block < blocks_; ++block) {
    const std::uint64_t some = w_.begin[std::min(groups_, (block + 1) * step_)] - w_.begin[block * step_];
    room_ = std::max(room_, whole_lines(quad_bytes(some, w_.lanes, tile)));
  }
}

std::size_t Int8Quads::bytes() const {
  return tiles_ * whole_lines(w_.cols * kernel_.tile) + workers_ * room_;
}

void Int8Quads::multiply(const std::uint8_t* x, std::size_t x_stride, const float* x_scale,
                         std::uint8_t* memory, const Epilogue& epilogue, const Output& y) const {
  const std::size_t tile = kernel_.tile;
  std::uint8_t* const room = memory + tiles_ * whole_lines(w_.cols * tile);
  for_each_task(tiles_, std::min(workers_, tiles_), [&](std::size_t, std::size_t i) {
    kernel_.make_tile(x + i * tile * x_stride, x_stride, std::min(tile, rows_ - i * tile), w_.cols,
                      memory + i * w_.cols * tile);
  });
  for_each_task(blocks_, workers_, [&](std::size_t worker, std::size_t block) {
    kernel_.multiply_quads(w_, block * step_, std::min(groups_, (block + 1) * step_), memory, x_scale, rows_,
                           room + worker * room_, epilogue, y);
  });
}

std::size_t quad_rows(const Form& w, std::size_t batch) {
  if (w.dtype() != DType::i8 || w.kind() != FormKind::slots) return 0;
  const Int8View slots = w.int8_slots();
  return Int8Quads(w, int8_kernels(slots.lanes, slots.window), batch).rows();
}

void use_quads(std::optional<bool> wanted) {
  use = !wanted.has_value() ? Use::where_faster : *wanted ? Use::always : Use::never;
}

}  // namespace sparsam
