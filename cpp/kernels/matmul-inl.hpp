// Matmul kernels, written once over Floats. Include after defining SPARSAM_TARGET and including its
// floats_*.hpp. Internal linkage throughout, for the reason given in selection-inl.hpp.
#pragma once
#include "activations-inl.hpp"
#include "matmul.hpp"
#include "sparsam/check.hpp"
#include "stores-inl.hpp"

namespace sparsam::SPARSAM_TARGET {
namespace {

// The first n (at most a vector) elements at p as floats, 0 in the other lanes; x is float32 or bfloat16.
SPARSAM_INLINE Floats::Reg load_x(const float* p) { return Floats::load(p); }
SPARSAM_INLINE Floats::Reg load_x(const Bfloat* p) { return Floats::load_values(p); }
SPARSAM_INLINE Floats::Reg load_x(const float* p, std::size_t n) { return Floats::load_partial(p, n); }
SPARSAM_INLINE Floats::Reg load_x(const Bfloat* p, std::size_t n) {
  Bfloat first[kLanes] = {};
  __builtin_memcpy(first, p, n * sizeof(Bfloat));
  return Floats::load_values(first);
}

void widen(const std::uint16_t* bfloats, std::size_t n, float* to) {
  for (std::size_t i = 0; i < n; ++i) to[i] = to_float(Bfloat{bfloats[i]});
}

// Adds the bias of rows [row, row + count) and applies the activation to sums that lie row by row in lanes.
SPARSAM_INLINE Floats::Reg finish_rows(Floats::Reg sums, Epilogue epilogue, std::size_t row,
                                       std::size_t count) {
  if (epilogue.bias != nullptr) sums = Floats::add(sums, Floats::load_partial(epilogue.bias + row, count));
  return activate(sums, epilogue.activation);
}

// The columns of one step, those at x and those of the rows of x after it, for kBatch sums.
template <class Weights, std::size_t kBatch, std::size_t kChains>
SPARSAM_INLINE void bitmask_step(Weights weights, const float* x, std::size_t x_stride, std::size_t chain,
                                 Floats::Reg (&sum)[kBatch][kChains]) {
#pragma GCC unroll 4
  for (std::size_t t = 0; t < kBatch; ++t)
    sum[t][chain] = Floats::fma_expanded(weights, Floats::load(x + t * x_stride), sum[t][chain]);
}

// One row of W, kBatch rows of x: 64 columns a step, independent chains for each so that the latency of the
// sums is hidden. `lines` cache lines of values are prefetched per step: without that, a core does not keep
// enough reads in flight.
template <class Value, std::size_t kBatch, std::size_t kLines>
SPARSAM_INLINE void bitmask_row(const BitmaskView& w, std::size_t row, const float* x, std::size_t x_stride,
                                float* sums) {
  constexpr std::size_t kSteps = 64 / kLanes, kChains = kBatch == 1 ? 4 : 2, kAhead = 2048;
  const std::uint64_t* words = w.words + row * w.row_words;
  const Value* p = static_cast<const Value*>(w.values) + w.row_start[row];
  SPARSAM_CHECK(row < w.rows && w.row_words * 64 >= w.cols);
  Floats::Reg sum[kBatch][kChains];
  for (auto& of_one : sum)
    for (auto& chain : of_one) chain = Floats::zero();
  for (std::size_t k = 0; k < w.row_words; ++k) {
    const std::uint64_t word = words[k];
    const Floats::Counts counts(word);
#pragma GCC unroll 4
    for (std::size_t line = 0; line < kLines; ++line)
      __builtin_prefetch(reinterpret_cast<const char*>(p) + kAhead + 64 * line);
    const auto add = [&](std::size_t step) __attribute__((always_inline)) {
      const auto bits = static_cast<std::uint32_t>(word >> (step * kLanes)) & ((1u << kLanes) - 1);
      const auto weights = Floats::expanded(p + counts.before(step), bits);
      bitmask_step(weights, x + k * 64 + step * kLanes, x_stride, step % kChains, sum);
    };
    // Sums of several rows that do not fit in registers gain nothing from long code, which takes long to
    // compile.
    if constexpr (kBatch == 1 || Floats::kFetches) {
#pragma GCC unroll 8
      for (std::size_t step = 0; step < kSteps; ++step) add(step);
    } else {
#pragma GCC unroll 1
      for (std::size_t step = 0; step < kSteps; ++step) add(step);
    }
    p += counts.all();
  }
  SPARSAM_CHECK(p == static_cast<const Value*>(w.values) + w.row_start[row + 1]);
  for (std::size_t t = 0; t < kBatch; ++t) {
    Floats::Reg total = sum[t][0];
    for (std::size_t chain = 1; chain < kChains; ++chain) total = Floats::add(total, sum[t][chain]);
    sums[t * kLanes] = Floats::sum(total);
  }
}

template <class Value, std::size_t kBatch, std::size_t kLines>
void bitmask_rows(const BitmaskView& w, std::size_t begin, std::size_t end, const float* x,
                  std::size_t x_stride, Epilogue epilogue, Output y) {
  float sums[kBatch * kLanes];
  for (std::size_t row = begin; row < end; row += kLanes) {
    const std::size_t count = end - row < kLanes ? end - row : kLanes;
    for (std::size_t i = 0; i < count; ++i)
      bitmask_row<Value, kBatch, kLines>(w, row + i, x, x_stride, sums + i);
    for (std::size_t t = 0; t < kBatch; ++t) {
      const auto out = finish_rows(Floats::load_partial(sums + t * kLanes, count), epilogue, row, count);
      if (y.narrow)
        store_y(static_cast<Bfloat*>(y.data) + t * y.stride + row, out, count);
      else
        store_y(static_cast<float*>(y.data) + t * y.stride + row, out, count);
    }
  }
}

template <class Value, std::size_t kBatch>
void bitmask_fetching(const BitmaskView& w, std::size_t begin, std::size_t end, const float* x,
                      std::size_t x_stride, Epilogue epilogue, Output y) {
  if constexpr (Floats::kFetches) {
    const std::uint64_t bytes = (w.row_start[end] - w.row_start[begin]) * sizeof(Value);
    const std::uint64_t steps = (end - begin) * w.row_words;
    if (bytes <= 64 * steps)
      bitmask_rows<Value, kBatch, 1>(w, begin, end, x, x_stride, epilogue, y);
    else if (bytes <= 128 * steps)
      bitmask_rows<Value, kBatch, 2>(w, begin, end, x, x_stride, epilogue, y);
    else
      bitmask_rows<Value, kBatch, 4>(w, begin, end, x, x_stride, epilogue, y);
  } else {
    bitmask_rows<Value, kBatch, 0>(w, begin, end, x, x_stride, epilogue, y);
  }
}

template <class Value>
void bitmask(const BitmaskView& w, std::size_t begin, std::size_t end, const float* x, std::size_t x_stride,
             std::size_t batch, Epilogue epilogue, Output y) {
  SPARSAM_CHECK(begin <= end && end <= w.rows && batch >= 1 && batch <= 4);
  if (batch == 1) bitmask_fetching<Value, 1>(w, begin, end, x, x_stride, epilogue, y);
  if (batch == 2) bitmask_fetching<Value, 2>(w, begin, end, x, x_stride, epilogue, y);
  if (batch == 3) bitmask_fetching<Value, 3>(w, begin, end, x, x_stride, epilogue, y);
  if (batch == 4) bitmask_fetching<Value, 4>(w, begin, end, x, x_stride, epilogue, y);
}

// The possible tiles: 1, 2 or 4 vectors that hold the batch.
SPARSAM_INLINE bool is_tile(std::size_t batch, std::size_t vectors) {
  return (vectors == 1 || vectors == 2 || vectors == 4) && batch <= vectors * kLanes;
}

template <class X, std::size_t kVectors>
void pack_tile(const X* x, std::size_t x_stride, std::size_t batch, std::size_t n, std::size_t depth,
               float* tile) {
  constexpr std::size_t kStride = kVectors * kLanes;
  for (std::size_t v = 0; v < kVectors; ++v) {
    const std::size_t first = v * kLanes;
    const std::size_t here = batch <= first ? 0 : batch - first < kLanes ? batch - first : kLanes;
    for (std::size_t k = 0; k < n; k += kLanes) {
      const std::size_t cols = n - k < kLanes ? n - k : kLanes;
      const X* p = x + first * x_stride + k;
      Floats::Reg r[kLanes];
      if (here == kLanes && cols == kLanes) {
#pragma GCC unroll 16
        for (std::size_t i = 0; i < kLanes; ++i) r[i] = load_x(p + i * x_stride);
      } else {
        for (std::size_t i = 0; i < kLanes; ++i)
          r[i] = i < here ? load_x(p + i * x_stride, cols) : Floats::zero();
      }
      Floats::transpose(r);
      float* to = tile + k * kStride + first;
      if (cols == kLanes) {
#pragma GCC unroll 16
        for (std::size_t i = 0; i < kLanes; ++i) Floats::store(to + i * kStride, r[i]);
      } else {
        for (std::size_t i = 0; i < cols; ++i) Floats::store(to + i * kStride, r[i]);
      }
    }
    Floats::store(tile + depth * kStride + first, Floats::zero());
  }
}

template <class X>
void pack_rows(Input x, std::size_t batch, std::size_t n, std::size_t depth, std::size_t vectors,
               float* tile) {
  const X* p = static_cast<const X*>(x.data);
  if (vectors == 1) pack_tile<X, 1>(p, x.stride, batch, n, depth, tile);
  if (vectors == 2) pack_tile<X, 2>(p, x.stride, batch, n, depth, tile);
  if (vectors == 4) pack_tile<X, 4>(p, x.stride, batch, n, depth, tile);
}

void pack(Input x, std::size_t batch, std::size_t n, std::size_t depth, std::size_t vectors, float* tile) {
  SPARSAM_CHECK(is_tile(batch, vectors) && n <= depth && depth <= kMaxDepth);
  if (x.narrow)
    pack_rows<Bfloat>(x, batch, n, depth, vectors, tile);
  else
    pack_rows<float>(x, batch, n, depth, vectors, tile);
}

template <std::size_t kVectors>
void gather_tile(const float* x, const std::uint32_t* columns, std::size_t n, std::size_t depth,
                 const Source* sources, float* tile) {
  constexpr std::size_t kStride = kVectors * kLanes;
  Source from[kVectors];  // a copy, which stores cannot alias
  bool whole = true;
  for (std::size_t v = 0; v < kVectors; ++v) {
    from[v] = sources[v];
    SPARSAM_CHECK(from[v].count <= kLanes);
    whole = whole && from[v].count == kLanes;
  }
  for (std::size_t k = 0; k < n; ++k) {
    const float* p = x + columns[k];
    float* to = tile + k * kStride;
#pragma GCC unroll 4
    for (std::size_t v = 0; v < kVectors; ++v)
      Floats::store(to + v * kLanes, whole ? Floats::load(p + from[v].at)
                                           : Floats::load_partial(p + from[v].at, from[v].count));
  }
  for (std::size_t v = 0; v < kVectors; ++v)
    Floats::store(tile + depth * kStride + v * kLanes, Floats::zero());
}

void gather(const float* x, const std::uint32_t* columns, std::size_t n, std::size_t depth,
            const Source* sources, std::size_t vectors, float* tile) {
  SPARSAM_CHECK(is_tile(0, vectors) && n <= depth && depth <= kMaxDepth);
  if (vectors == 1) gather_tile<1>(x, columns, n, depth, sources, tile);
  if (vectors == 2) gather_tile<2>(x, columns, n, depth, sources, tile);
  if (vectors == 4) gather_tile<4>(x, columns, n, depth, sources, tile);
}

// The offsets of one step, read at once.
template <std::size_t kBytes>
struct Step;
template <>
struct Step<1> {
  using Word = std::uint8_t;
};
template <>
struct Step<2> {
  using Word = std::uint16_t;
};
template <>
struct Step<4> {
  using Word = std::uint32_t;
};
template <>
struct Step<8> {
  using Word = std::uint64_t;
};

// The four entries of one step: sum[r] += weight r * the column of x that its offset names.
template <class Offset, std::size_t kVectors, bool kShared, class Value, class Word>
SPARSAM_INLINE void panel_step(const Value* value, Word offsets, const float* tile,
                               Floats::Reg (&sum)[4][kVectors]) {
  constexpr std::size_t kStride = kVectors * kLanes, kBits = 8 * sizeof(Offset);
  Floats::Reg weight[4];
  Floats::broadcast4(value, weight);
  if constexpr (kShared) {
    const float* x = tile + static_cast<std::size_t>(offsets) * kStride;
#pragma GCC unroll 4
    for (std::size_t v = 0; v < kVectors; ++v) {
      Floats::Reg column = Floats::load(x + v * kLanes);
      Floats::keep_in_register(column);
#pragma GCC unroll 4
      for (std::size_t r = 0; r < 4; ++r) sum[r][v] = Floats::fma(weight[r], column, sum[r][v]);
    }
  } else {
#pragma GCC unroll 4
    for (std::size_t r = 0; r < 4; ++r) {
      const float* x = tile + static_cast<std::size_t>(static_cast<Offset>(offsets >> (kBits * r))) * kStride;
#pragma GCC unroll 4
      for (std::size_t v = 0; v < kVectors; ++v)
        sum[r][v] = Floats::fma(weight[r], Floats::load(x + v * kLanes), sum[r][v]);
    }
  }
}

// In the assertion build, that the offsets of a step lie in the tile; `depth` is its column of zeros.
template <class Offset, bool kShared, class Word>
SPARSAM_INLINE void check_offsets([[maybe_unused]] Word offsets, [[maybe_unused]] std::size_t depth) {
  for (std::size_t r = 0; r < (kShared ? 1 : 4); ++r)
    SPARSAM_CHECK(static_cast<Offset>(offsets >> (8 * sizeof(Offset) * r)) <= depth);
}

// One block: the sums of a unit's four rows stay in registers while its entries stream by. Rows are sorted by
// their number of entries, so successive loops have equal lengths and their branches are predicted. The
// offsets are read one step ahead: an address that waits for a load delays the loads after it. Narrow tiles
// are limited by loads, and a prefetch is one: there is one for every four steps, which are a cache line of
// floats. A tile of one vector has too few sums to hide the latency of adding to them, so every other step
// adds to a second set if registers hold both.
template <class Value, class Offset, std::size_t kVectors, bool kShared>
void panel_block(const PanelView& w, const PanelBlock* block, bool first, const float* tile, float* sums) {
  constexpr std::size_t kStride = kVectors * kLanes, kOffsets = kShared ? 1 : 4;
  using Word = typename Step<kOffsets * sizeof(Offset)>::Word;
  const std::uint16_t* header = w.headers + kUnitHeader * block[0].unit;
  const std::uint16_t* const last = w.headers + kUnitHeader * block[1].unit;
  const Offset* offset = static_cast<const Offset*>(w.offsets) + kOffsets * block[0].step;
  const Value* value = static_cast<const Value*>(w.values) + 4 * block[0].step;
  for (; header != last; header += kUnitHeader) {
    Floats::Reg sum[4][kVectors];
    float* row[4];
#pragma GCC unroll 4
    for (std::size_t r = 0; r < 4; ++r) {
      SPARSAM_CHECK(header[1 + r] <= kRowBlock);
      row[r] = sums + header[1 + r] * kStride;
#pragma GCC unroll 4
      for (std::size_t v = 0; v < kVectors; ++v)
        sum[r][v] = first ? Floats::zero() : Floats::load(row[r] + v * kLanes);
    }
    const Value* const end = value + 4 * static_cast<std::size_t>(header[0]);
    SPARSAM_CHECK(end <= static_cast<const Value*>(w.values) + 4 * block[1].step);
    Word next;
    __builtin_memcpy(&next, offset, sizeof next);
    if constexpr (kVectors <= 2 && Floats::kOneRegister) {
      Floats::Reg other[4][kVectors] = {};
      const Value* const quads = value + (end - value) / 16 * 16;
      for (; value != quads; value += 16, offset += 4 * kOffsets) {
        __builtin_prefetch(reinterpret_cast<const char*>(value) + 2048);
        if constexpr (kVectors == 1) __builtin_prefetch(reinterpret_cast<const char*>(offset) + 1024);
#pragma GCC unroll 4
        for (std::size_t step = 0; step < 4; ++step) {
          const Word now = next;
          __builtin_memcpy(&next, offset + (step + 1) * kOffsets, sizeof next);
          check_offsets<Offset, kShared>(now, w.depth);
          panel_step<Offset, kVectors, kShared>(value + 4 * step, now, tile,
                                                kVectors == 1 && step % 2 == 1 ? other : sum);
        }
      }
      if constexpr (kVectors == 1)
#pragma GCC unroll 4
        for (std::size_t r = 0; r < 4; ++r) sum[r][0] = Floats::add(sum[r][0], other[r][0]);
    }
    for (; value != end; value += 4, offset += kOffsets) {
      const Word now = next;
      __builtin_memcpy(&next, offset + kOffsets, sizeof next);
      check_offsets<Offset, kShared>(now, w.depth);
      panel_step<Offset, kVectors, kShared>(value, now, tile, sum);
    }
#pragma GCC unroll 4
    for (std::size_t r = 0; r < 4; ++r)
#pragma GCC unroll 4
      for (std::size_t v = 0; v < kVectors; ++v) Floats::store(row[r] + v * kLanes, sum[r][v]);
  }
}

// sums [rows][kVectors * lanes] to row-major y; adds the bias and applies the activation.
template <class Y, std::size_t kVectors>
void unpack_rows(const float* sums, std::size_t first_row, std::size_t rows, std::size_t batch,
                 Epilogue epilogue, Y* y, std::size_t y_stride) {
  constexpr std::size_t kStride = kVectors * kLanes;
  for (std::size_t v = 0; v * kLanes < batch; ++v) {
    const std::size_t here = batch - v * kLanes < kLanes ? batch - v * kLanes : kLanes;
    for (std::size_t m = 0; m < rows; m += kLanes) {
      const std::size_t count = rows - m < kLanes ? rows - m : kLanes;
      Floats::Reg r[kLanes];
#pragma GCC unroll 16
      for (std::size_t i = 0; i < kLanes; ++i)
        r[i] = i < count ? Floats::load(sums + (m + i) * kStride + v * kLanes) : Floats::zero();
      Floats::transpose(r);
      Y* to = y + v * kLanes * y_stride + first_row + m;
      for (std::size_t i = 0; i < here; ++i) r[i] = finish_rows(r[i], epilogue, first_row + m, count);
      if (count == kLanes) {
        for (std::size_t i = 0; i < here; ++i) store_y(to + i * y_stride, r[i], kLanes);
      } else {
        for (std::size_t i = 0; i < here; ++i) store_y(to + i * y_stride, r[i], count);
      }
    }
  }
}

// sums [rows][kVectors * lanes] to y, which has a row for each of them; adds the bias and applies the
// activation.
template <std::size_t kVectors>
void store_rows(const float* sums, std::size_t first_row, std::size_t rows, Epilogue epilogue,
                const Stretch* stretches, std::size_t n, float* y, std::size_t y_stride) {
  for (std::size_t m = 0; m < rows; ++m) {
    const Floats::Reg bias = Floats::set1(epilogue.bias == nullptr ? 0.0f : epilogue.bias[first_row + m]);
    for (const Stretch* s = stretches; s < stretches + n; ++s) {
      const float* from = sums + m * kVectors * kLanes + s->from;
      float* to = y + (first_row + m) * y_stride + s->to;
      for (std::size_t i = 0; i < s->count; i += kLanes) {
        const auto out = activate(Floats::add(Floats::load(from + i), bias), epilogue.activation);
        store_y(to + i, out, s->count - i < kLanes ? s->count - i : kLanes);
      }
    }
  }
}

// Multiplies all depth blocks of a row block with a tile, and adds to sums.
template <class Value, class Offset, std::size_t kVectors>
void all_blocks(const PanelView& w, std::size_t row_block, const float* tile, float* sums) {
  static_assert(kVectors <= kMaxVectors);
  for (std::size_t d = 0; d < w.depth_blocks; ++d) {
    const PanelBlock* block = w.blocks + row_block * w.depth_blocks + d;
    const float* part = tile + d * (w.depth + 1) * kVectors * kLanes;
    if (w.shared)
      panel_block<Value, Offset, kVectors, true>(w, block, d == 0, part, sums);
    else
      panel_block<Value, Offset, kVectors, false>(w, block, d == 0, part, sums);
  }
}

template <class Value, std::size_t kVectors>
void panel_sums(const PanelView& w, std::size_t row_block, const float* tile, float* sums) {
  if (w.depth < 256)
    all_blocks<Value, std::uint8_t, kVectors>(w, row_block, tile, sums);
  else
    all_blocks<Value, std::uint16_t, kVectors>(w, row_block, tile, sums);
}

std::size_t rows_of(const PanelView& w, std::size_t row_block) {
  const std::size_t first_row = row_block * kRowBlock;
  return w.rows - first_row < kRowBlock ? w.rows - first_row : kRowBlock;
}

template <class Value, std::size_t kVectors>
void panel_tile(const PanelView& w, std::size_t row_block, const float* tile, std::size_t batch, float* sums,
                Epilogue epilogue, Output y) {
  panel_sums<Value, kVectors>(w, row_block, tile, sums);
  const std::size_t first = row_block * kRowBlock, rows = rows_of(w, row_block);
  if (y.narrow)
    unpack_rows<Bfloat, kVectors>(sums, first, rows, batch, epilogue, static_cast<Bfloat*>(y.data), y.stride);
  else
    unpack_rows<float, kVectors>(sums, first, rows, batch, epilogue, static_cast<float*>(y.data), y.stride);
}

template <class Value, std::size_t kVectors>
void panel_tile_across(const PanelView& w, std::size_t row_block, const float* tile, float* sums,
                       Epilogue epilogue, const Stretch* stretches, std::size_t n, float* y,
                       std::size_t y_stride) {
  panel_sums<Value, kVectors>(w, row_block, tile, sums);
  store_rows<kVectors>(sums, row_block * kRowBlock, rows_of(w, row_block), epilogue, stretches, n, y,
                       y_stride);
}

template <class Value>
void panel_across(const PanelView& w, std::size_t row_block, const float* tile, std::size_t vectors,
                  float* sums, Epilogue epilogue, const Stretch* stretches, std::size_t n, float* y,
                  std::size_t y_stride) {
  SPARSAM_CHECK(is_tile(0, vectors) && row_block * kRowBlock < w.rows);
  for (std::size_t s = 0; s < n; ++s)
    SPARSAM_CHECK(stretches[s].from + stretches[s].count <= vectors * kLanes);
  if (vectors == 1)
    panel_tile_across<Value, 1>(w, row_block, tile, sums, epilogue, stretches, n, y, y_stride);
  if (vectors == 2)
    panel_tile_across<Value, 2>(w, row_block, tile, sums, epilogue, stretches, n, y, y_stride);
  if (vectors == 4)
    panel_tile_across<Value, 4>(w, row_block, tile, sums, epilogue, stretches, n, y, y_stride);
}

template <class Value>
void panel(const PanelView& w, std::size_t row_block, const float* tile, std::size_t vectors,
           std::size_t batch, float* sums, Epilogue epilogue, Output y) {
  SPARSAM_CHECK(is_tile(batch, vectors) && row_block * kRowBlock < w.rows);
  if (vectors == 1) panel_tile<Value, 1>(w, row_block, tile, batch, sums, epilogue, y);
  if (vectors == 2) panel_tile<Value, 2>(w, row_block, tile, batch, sums, epilogue, y);
  if (vectors == 4) panel_tile<Value, 4>(w, row_block, tile, batch, sums, epilogue, y);
}

}  // namespace
}  // namespace sparsam::SPARSAM_TARGET

#include "slots-inl.hpp"

namespace sparsam::SPARSAM_TARGET {
namespace {

constexpr MatmulKernels kMatmulKernels = {
    kLanes,
    &pack,
    &gather,
    &widen,
    {&bitmask<float>, &panel<float>, &panel_across<float>, &slots<float>},
    {&bitmask<Bfloat>, &panel<Bfloat>, &panel_across<Bfloat>, &slots<Bfloat>},
    {&bitmask<Half>, &panel<Half>, &panel_across<Half>, &slots<Half>},
};

}  // namespace
}  // namespace sparsam::SPARSAM_TARGET
