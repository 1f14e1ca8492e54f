// Linear layers: by bitmask, by slots, and by panels in tiles of rows of x.
#include <algorithm>
#include <cstring>
#include <iterator>
#include <stdexcept>

#include "int8_linear.hpp"
#include "panel_tiles.hpp"
#include "ranges.hpp"
#include "sparsam/errors.hpp"
#include "sparsam/isa.hpp"
#include "table.hpp"

namespace sparsam {
namespace {

Output rows_from(Output y, std::size_t row) {
  const std::size_t bytes = row * y.stride * (y.narrow ? 2 : sizeof(float));
  return {static_cast<char*>(y.data) + bytes, y.stride, y.narrow};
}

// The first n columns of rows of x as floats, followed by zeros up to `stride`.
void copy_padded(const MatmulKernels& m, const Input& x, std::size_t row, std::size_t n, std::size_t stride,
                 float* to) {
  if (x.narrow) {
    m.widen(static_cast<const std::uint16_t*>(x.data) + row * x.stride, n, to);
  } else {
    const float* const from = static_cast<const float*>(x.data) + row * x.stride;
    std::copy(from, from + n, to);
  }
  std::fill(to + n, to + stride, 0.0f);
}

// `count` rows of x from row t on, each padded, to `to`, which is returned.
const float* copy_padded_rows(const MatmulKernels& m, const Input& x, std::size_t t, std::size_t count,
                              std::size_t cols, std::size_t stride, float* to) {
  for (std::size_t i = 0; i < count; ++i) copy_padded(m, x, t + i, cols, stride, to + i * stride);
  return to;
}

void by_bitmask(const MatmulKernels& m, const Form& form, const Input& x, std::size_t batch,
                Epilogue epilogue, const Output& y) {
  constexpr std::size_t kRows = 4;  // of x at a time
  const BitmaskView w = form.bitmask();
  const ValueKernels& kernel = kernels_for(m, form.dtype());
  const std::size_t x_stride = w.row_words * 64;
  const std::size_t step = std::max<std::size_t>(64, ((std::size_t{1} << 17) / (x_stride + 1)) / 64 * 64);
  const std::size_t tasks = (w.rows + step - 1) / step;
  // The kernel reads whole words of columns, and reads vectors that cross cache lines at half the speed.
  const bool as_it_came =
      !x.narrow && w.cols == x_stride && reinterpret_cast<std::uintptr_t>(x.data) % 64 == 0;
  const Scratch<Purpose::tiles> padded(as_it_came ? 0 : std::min(kRows, batch) * x_stride);
  for (std::size_t t = 0; t < batch; t += kRows) {
    const std::size_t here = std::min(kRows, batch - t);
    const float* from = static_cast<const float*>(x.data) + t * x.stride;
    if (!as_it_came) from = copy_padded_rows(m, x, t, here, w.cols, x_stride, padded.data());
    for_each_task(tasks, worker_count(tasks, w.rows * w.cols >= kSerialBelow),
                  [&](std::size_t, std::size_t task) {
                    kernel.bitmask(w, task * step, std::min(w.rows, (task + 1) * step), from, x_stride, here,
                                   epilogue, rows_from(y, t));
                  });
  }
}

// Integers, which compilers add up in vectors.
bool all_finite(const float* x, std::size_t n) {
  std::uint32_t others = 0;
  for (std::size_t i = 0; i < n; ++i) {
    std::uint32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    others |= static_cast<std::uint32_t>((bits & 0x7f800000) == 0x7f800000);
  }
  return others == 0;
}

// The number of multiplications from which threads save more time than they cost: starting and joining two
// took 1 microsecond in some processes and 3 in others, on one machine, so that fewer products gain a fifth
// or lose a half.
constexpr std::size_t kSlotsSerialBelow = kSerialBelow / 4;

void by_slots(const MatmulKernels& m, const Form& form, const Input& x, std::size_t batch, Epilogue epilogue,
              const Output& y) {
  const SlotView w = form.slots();
  const ValueKernels& kernel = kernels_for(m, form.dtype());
  const std::size_t blocks = (w.rows + kSlotBlock - 1) / kSlotBlock;
  const std::size_t x_stride = std::max(w.cols, w.depth);
  // The kernel reads a whole window of columns, so shorter rows of x are copied and padded.
  const bool as_it_came = !x.narrow && w.cols == x_stride;
  const Scratch<Purpose::tiles> padded(as_it_came ? 0 : std::min(kSlotBatch, batch) * x_stride);
  for (std::size_t t = 0; t < batch; t += kSlotBatch) {
    const std::size_t here = std::min(kSlotBatch, batch - t);
    const float* from = static_cast<const float*>(x.data) + t * x.stride;
    if (!as_it_came) from = copy_padded_rows(m, x, t, here, w.cols, x_stride, padded.data());
    const std::size_t workers = worker_count(blocks, here * form.nnz() >= kSlotsSerialBelow);
    const bool finite = w.full && all_finite(from, here * x_stride);
    for_each_in_ranges(blocks, workers, [&](std::size_t block) {
      kernel.slots(w, block, from, x_stride, here, finite, epilogue, rows_from(y, t));
    });
  }
}

struct LinearProduct : PanelTiles {
  Input x;
  std::size_t batch;
  Output y;

  LinearProduct(const PanelTiles& t, const Input& from, std::size_t n, const Output& to)
      : PanelTiles(t), x(from), batch(n), y(to) {}

  std::size_t tiles() const { return (batch + wide() - 1) / wide(); }
  std::size_t rows_of(std::size_t tile) const { return std::min(wide(), batch - tile * wide()); }
  // The last tile has only as many vectors as it needs.
  std::size_t vectors_of(std::size_t tile) const {
    const std::size_t needed = (rows_of(tile) + m.lanes - 1) / m.lanes;
    return needed <= 2 ? needed : vectors;
  }

  // Block d of a tile to its place in the packed tile.
  void pack(std::size_t tile, std::size_t d, float* packed) const {
    const std::size_t from = (tile * wide() * x.stride + d * w.depth) * (x.narrow ? 2 : sizeof(float));
    m.pack({static_cast<const char*>(x.data) + from, x.stride, x.narrow}, rows_of(tile), columns_of(d),
           w.depth, vectors_of(tile), packed + d * (w.depth + 1) * vectors_of(tile) * m.lanes);
  }
  void multiply(std::size_t tile, std::size_t row_block, const float* packed, float* sums) const {
    kernel.panel(w, row_block, packed, vectors_of(tile), rows_of(tile), sums, epilogue,
                 rows_from(y, tile * wide()));
  }
};

void multiply(const Form& form, const void* x, std::size_t batch, const float* bias,
              const std::string& activation, void* y, bool narrow) {
  const Epilogue epilogue{bias, activation_of(activation)};
  if (form.rows() == 0 || batch == 0) return;
  const MatmulKernels& m = kernels().matmul;  // read once: another thread may call use_isa()
  const Input from{x, form.cols(), narrow};
  const Output to{y, form.rows(), narrow};
  if (form.taps().count() != 0)
    throw std::invalid_argument(expected("weight",
                                         "that of a convolution, whose columns are in another order",
                                         "that of a linear layer", "use conv2d"));
  if (form.dtype() == DType::i8 || form.dtype() == DType::i4) {
    int8_linear(form, from, batch, epilogue, to);
    return;
  }
  if (form.kind() == FormKind::bitmask) {
    by_bitmask(m, form, from, batch, epilogue, to);
    return;
  }
  if (form.kind() == FormKind::slots) {
    by_slots(m, form, from, batch, epilogue, to);
    return;
  }
  const PanelView w = form.panels();
  const PanelTiles tiles{w, m, kernels_for(m, form.dtype()), tile_vectors(batch, m, w), epilogue};
  run_tiles(LinearProduct(tiles, from, batch, to), batch * form.nnz() >= kSerialBelow);
}

}  // namespace

Activation activation_of(const std::string& name) {
  constexpr const char* kNames[] = {"", "relu", "gelu", "gelu_tanh", "silu"};
  for (std::size_t i = 0; i < std::size(kNames); ++i)
    if (name == kNames[i]) return static_cast<Activation>(i);
  throw std::invalid_argument(
      expected("activation", quoted(name), "relu, gelu, gelu_tanh or silu", "pass one of them"));
}

const ValueKernels& kernels_for(const MatmulKernels& m, DType dtype) {
  return dtype == DType::f32 ? m.f32 : dtype == DType::bf16 ? m.bf16 : m.f16;
}

std::size_t tile_vectors(std::size_t batch, const MatmulKernels& m, const PanelView& w) {
  if (batch <= m.lanes) return 1;
  return batch <= 2 * m.lanes || m.lanes < kMaxLanes || w.depth > 128 ? 2 : kMaxVectors;
}

void linear(const Form& w, const float* x, std::size_t batch, const float* bias,
            const std::string& activation, float* y) {
  multiply(w, x, batch, bias, activation, y, false);
}

void linear(const Form& w, const std::uint16_t* x, std::size_t batch, const float* bias,
            const std::string& activation, std::uint16_t* y) {
  multiply(w, x, batch, bias, activation, y, true);
}

}  // namespace sparsam
