// Linear layers with int8 and int4 values: x is quantised row by row, then groups of rows of W are shared
// out.
#include <algorithm>

#include "int8_linear.hpp"
#include "int8_quads.hpp"
#include "panel_tiles.hpp"
#include "ranges.hpp"
#include "sparsam/isa.hpp"
#include "table.hpp"

namespace sparsam {
namespace {

// Rows of x that are worked on together, so that they stay in a part of the L1 cache.
std::size_t block_of(std::size_t x_stride) {
  constexpr std::size_t kBytes = 16384;
  return std::max<std::size_t>(1, kBytes / x_stride / kInt8Batch) * kInt8Batch;
}

struct Int8Product {
  Int8View w;
  const Int8Kernels& kernel;

  explicit Int8Product(const Form& form) : w(form.int8_slots()), kernel(int8_kernels(w.lanes, w.window)) {}
  std::size_t pair_slots() const { return int8_pair_slots(w.lanes, w.window); }
  std::uint64_t first_pair(std::size_t group) const { return w.begin[group]; }
  auto multiply() const { return kernel.multiply; }
  std::size_t lanes() const { return w.lanes; }
  std::uint64_t pairs(const Form& form) const { return form.header().steps; }
};

struct Int4Product {
  Int4View w;
  const Int8Kernels& kernel;

  explicit Int4Product(const Form& form) : w(form.int4_slots()), kernel(int4_kernels(w.lanes)) {}
  std::size_t pair_slots() const { return 8 * w.lanes; }
  std::uint64_t first_pair(std::size_t group) const { return w.first_pair(group, 0); }
  auto multiply() const { return kernel.multiply_int4; }
  std::size_t lanes() const { return w.lanes; }
  std::uint64_t pairs(const Form& form) const { return form.header().steps; }
};

// Whose groups have as many steps each.
struct Int4BitmaskProduct {
  Int4BitmaskView w;
  const Int8Kernels& kernel;

  explicit Int4BitmaskProduct(const Form& form) : w(form.int4_bitmask()), kernel(int4_bitmask_kernels()) {}
  std::size_t pair_slots() const { return kInt4Rows * kInt4Step; }
  std::uint64_t first_pair(std::size_t group) const { return group * w.steps(); }
  auto multiply() const { return kernel.multiply_int4_bitmask; }
  std::size_t lanes() const { return kInt4Rows; }
  std::uint64_t pairs(const Form&) const { return first_pair(w.groups()); }
};

template <class Product>
void integer_linear(const Form& form, const Input& x, std::size_t batch, Epilogue epilogue, const Output& y) {
  const Product product(form);
  const auto& w = product.w;
  const Int8Kernels& kernel = product.kernel;
  const std::size_t groups = (w.rows + product.lanes() - 1) / product.lanes();
  const std::uint64_t pairs = product.pairs(form);
  const std::size_t x_stride = (w.cols + kInt8Slack + 63) / 64 * 64;
  const Int8Quads quads(form, kernel, batch);
  const std::size_t before = quads.rows() == 0 ? 0 : quads.bytes();  // of x, a multiple of 64
  const std::size_t all = before + batch * (x_stride + sizeof(float));
  const Scratch<Purpose::tiles> memory(all / sizeof(float) + 1);
  auto* const bytes = reinterpret_cast<std::uint8_t*>(memory.data()) + before;
  auto* const scales = reinterpret_cast<float*>(bytes + batch * x_stride);

  const std::size_t x_item = x.narrow ? 2 : sizeof(float), y_item = y.narrow ? 2 : sizeof(float);
  auto quantise = [&](std::size_t, std::size_t part) {
    for (std::size_t t = part * kInt8Batch; t < std::min(batch, (part + 1) * kInt8Batch); ++t) {
      const char* const from = static_cast<const char*>(x.data) + t * x.stride * x_item;
      scales[t] = kernel.quantise(from, x.narrow, w.cols, bytes + t * x_stride);
    }
  };
  const std::size_t parts = (batch + kInt8Batch - 1) / kInt8Batch;
  for_each_task(parts, worker_count(parts, batch * w.cols >= kSerialBelow / 4), quantise);

  if (quads.rows() != 0) quads.multiply(bytes, x_stride, scales, bytes - before, epilogue, y);
  if (quads.rows() == batch) return;

  // Tasks have about as many steps each, and write separate rows of y.
  const std::uint64_t work = pairs * (batch - quads.rows());
  const std::size_t workers = worker_count(groups, work * product.pair_slots() >= kSerialBelow);
  const bool once = batch <= kInt8Batch;  // one pass over the weights
  const std::size_t tasks = workers == 1 ? 1 : std::min(groups, (once ? 4 : 8) * workers);
  const std::size_t block = block_of(x_stride);
  const auto edge = [&](std::size_t task) {
    const std::uint64_t pair = pairs * task / tasks;
    if (task == tasks) return groups;
    std::size_t low = 0, high = groups;  // the first group from that pair on
    while (low < high) {
      const std::size_t middle = (low + high) / 2;
      if (product.first_pair(middle) < pair)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  };
  const auto multiply = [&](std::size_t task) {
    const std::size_t begin = edge(task), end = edge(task + 1);
    const std::size_t step = once ? std::max<std::size_t>(1, end - begin) : 1;
    for (std::size_t from = quads.rows(); from < batch; from += block)
      for (std::size_t group = begin; group < end; group += step) {
        const std::size_t here = std::min(block, batch - from), passes = (here + kInt8Batch - 1) / kInt8Batch;
        for (std::size_t pass = 0; pass < passes; ++pass) {  // of about equal numbers of rows of x
          const std::size_t t = from + here * pass / passes, next = from + here * (pass + 1) / passes;
          const Output to{static_cast<char*>(y.data) + t * y.stride * y_item, y.stride, y.narrow};
          product.multiply()(w, group, group + step, bytes + t * x_stride, x_stride, scales + t, next - t,
                             epilogue, to);
        }
      }
  };
  if (once)
    for_each_in_ranges(tasks, workers, multiply);
  else
    for_each_task(tasks, workers, [&](std::size_t, std::size_t task) { multiply(task); });
}

}  // namespace

void int8_linear(const Form& form, const Input& x, std::size_t batch, Epilogue epilogue, const Output& y) {
  if (form.dtype() == DType::i4 && form.kind() == FormKind::bitmask)
    integer_linear<Int4BitmaskProduct>(form, x, batch, epilogue, y);
  else if (form.dtype() == DType::i4)
    integer_linear<Int4Product>(form, x, batch, epilogue, y);
  else
    integer_linear<Int8Product>(form, x, batch, epilogue, y);
}

}  // namespace sparsam
