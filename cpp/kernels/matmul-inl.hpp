// Matmul kernels, written once over Floats. Include after defining SPARSAM_TARGET and including its
// floats_*.hpp. Internal linkage throughout, for the reason given in selection-inl.hpp.
#pragma once
#include "activations-inl.hpp"
#include "matmul.hpp"

#define SPARSAM_INLINE inline __attribute__((always_inline))

namespace sparsam::SPARSAM_TARGET {
namespace {

constexpr std::size_t kLanes = Floats::kLanes;

// Adds the bias of rows [row, row + count) and applies the activation to sums that lie row by row in lanes.
SPARSAM_INLINE Floats::Reg finish_rows(Floats::Reg sums, Epilogue epilogue, std::size_t row,
                                       std::size_t count) {
  if (epilogue.bias != nullptr) sums = Floats::add(sums, Floats::load_partial(epilogue.bias + row, count));
  return activate(sums, epilogue.activation);
}

// One row, kTokens tokens: 64 columns a step, four independent chains per token so that the latency of the
// sums is hidden. `lines` cache lines of values are fetched ahead per step: a core alone does not keep enough
// reads in flight.
template <class Value, std::size_t kTokens, std::size_t kLines>
SPARSAM_INLINE void bitmask_row(const BitmaskView& w, std::size_t row, const float* x, std::size_t x_stride,
                                float* sums) {
  constexpr std::size_t kSteps = 64 / kLanes, kChains = kTokens == 1 ? 4 : 2, kAhead = 2048;
  const std::uint64_t* words = w.words + row * w.row_words;
  const Value* p = static_cast<const Value*>(w.values) + w.row_start[row];
  Floats::Reg sum[kTokens][kChains];
  for (auto& token : sum)
    for (auto& chain : token) chain = Floats::zero();
  for (std::size_t k = 0; k < w.row_words; ++k) {
    const std::uint64_t word = words[k];
#pragma GCC unroll 4
    for (std::size_t line = 0; line < kLines; ++line)
      __builtin_prefetch(reinterpret_cast<const char*>(p) + kAhead + 64 * line);
#pragma GCC unroll 8
    for (std::size_t step = 0; step < kSteps; ++step) {
      const auto bits = static_cast<std::uint32_t>(word >> (step * kLanes)) & ((1u << kLanes) - 1);
      const std::uint64_t before = step == 0 ? 0 : word << (64 - step * kLanes);
      const Value* values = p + __builtin_popcountll(before);
#pragma GCC unroll 4
      for (std::size_t t = 0; t < kTokens; ++t) {
        Floats::Reg& chain = sum[t][step % kChains];
        chain = Floats::fma_expanded(values, bits, Floats::load(x + t * x_stride + k * 64 + step * kLanes),
                                     chain);
      }
    }
    p += __builtin_popcountll(word);
  }
  for (std::size_t t = 0; t < kTokens; ++t) {
    Floats::Reg total = sum[t][0];
    for (std::size_t chain = 1; chain < kChains; ++chain) total = Floats::add(total, sum[t][chain]);
    sums[t * kLanes] = Floats::sum(total);
  }
}

template <class Value, std::size_t kTokens, std::size_t kLines>
void bitmask_rows(const BitmaskView& w, std::size_t begin, std::size_t end, const float* x,
                  std::size_t x_stride, Epilogue epilogue, float* y, std::size_t y_stride) {
  float sums[kTokens * kLanes];
  for (std::size_t row = begin; row < end; row += kLanes) {
    const std::size_t count = end - row < kLanes ? end - row : kLanes;
    for (std::size_t i = 0; i < count; ++i)
      bitmask_row<Value, kTokens, kLines>(w, row + i, x, x_stride, sums + i);
    for (std::size_t t = 0; t < kTokens; ++t) {
      const auto out = finish_rows(Floats::load_partial(sums + t * kLanes, count), epilogue, row, count);
      Floats::store_partial(y + t * y_stride + row, out, count);
    }
  }
}

template <class Value, std::size_t kTokens>
void bitmask_tokens(const BitmaskView& w, std::size_t begin, std::size_t end, const float* x,
                    std::size_t x_stride, Epilogue epilogue, float* y, std::size_t y_stride) {
  const std::uint64_t bytes = (w.row_start[end] - w.row_start[begin]) * sizeof(Value);
  const std::uint64_t steps = (end - begin) * w.row_words;
  if (bytes <= 64 * steps)
    bitmask_rows<Value, kTokens, 1>(w, begin, end, x, x_stride, epilogue, y, y_stride);
  else if (bytes <= 128 * steps)
    bitmask_rows<Value, kTokens, 2>(w, begin, end, x, x_stride, epilogue, y, y_stride);
  else
    bitmask_rows<Value, kTokens, 4>(w, begin, end, x, x_stride, epilogue, y, y_stride);
}

template <class Value>
void bitmask(const BitmaskView& w, std::size_t begin, std::size_t end, const float* x, std::size_t x_stride,
             std::size_t tokens, Epilogue epilogue, float* y, std::size_t y_stride) {
  if (tokens == 1) bitmask_tokens<Value, 1>(w, begin, end, x, x_stride, epilogue, y, y_stride);
  if (tokens == 2) bitmask_tokens<Value, 2>(w, begin, end, x, x_stride, epilogue, y, y_stride);
  if (tokens == 3) bitmask_tokens<Value, 3>(w, begin, end, x, x_stride, epilogue, y, y_stride);
  if (tokens == 4) bitmask_tokens<Value, 4>(w, begin, end, x, x_stride, epilogue, y, y_stride);
}

template <std::size_t kVectors>
void pack_tile(const float* x, std::size_t x_stride, std::size_t tokens, std::size_t n, std::size_t depth,
               float* tile) {
  constexpr std::size_t kStride = kVectors * kLanes;
  for (std::size_t v = 0; v < kVectors; ++v) {
    const std::size_t first = v * kLanes;
    const std::size_t here = tokens <= first ? 0 : tokens - first < kLanes ? tokens - first : kLanes;
    for (std::size_t k = 0; k < n; k += kLanes) {
      const std::size_t cols = n - k < kLanes ? n - k : kLanes;
      const float* p = x + first * x_stride + k;
      Floats::Reg r[kLanes];
      if (here == kLanes && cols == kLanes) {
#pragma GCC unroll 16
        for (std::size_t i = 0; i < kLanes; ++i) r[i] = Floats::load(p + i * x_stride);
      } else {
        for (std::size_t i = 0; i < kLanes; ++i)
          r[i] = i < here ? Floats::load_partial(p + i * x_stride, cols) : Floats::zero();
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

void pack(const float* x, std::size_t x_stride, std::size_t tokens, std::size_t n, std::size_t depth,
          std::size_t vectors, float* tile) {
  if (vectors == 1) pack_tile<1>(x, x_stride, tokens, n, depth, tile);
  if (vectors == 2) pack_tile<2>(x, x_stride, tokens, n, depth, tile);
  if (vectors == 4) pack_tile<4>(x, x_stride, tokens, n, depth, tile);
}

template <std::size_t kVectors>
void gather_tile(const float* x, const std::uint32_t* columns, std::size_t n, std::size_t depth,
                 const Source* sources, float* tile) {
  constexpr std::size_t kStride = kVectors * kLanes;
  Source from[kVectors];  // a copy, which no store can change
  bool whole = true;
  for (std::size_t v = 0; v < kVectors; ++v) {
    from[v] = sources[v];
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
  if (vectors == 1) gather_tile<1>(x, columns, n, depth, sources, tile);
  if (vectors == 2) gather_tile<2>(x, columns, n, depth, sources, tile);
  if (vectors == 4) gather_tile<4>(x, columns, n, depth, sources, tile);
}

void widen(const std::uint16_t* bfloats, std::size_t n, float* to) {
  for (std::size_t i = 0; i < n; ++i) {
    const std::uint32_t bits = static_cast<std::uint32_t>(bfloats[i]) << 16;
    __builtin_memcpy(to + i, &bits, sizeof bits);
  }
}

void narrow(const float* from, std::size_t n, std::uint16_t* bfloats) {
  for (std::size_t i = 0; i < n; ++i) {
    std::uint32_t bits;
    __builtin_memcpy(&bits, from + i, sizeof bits);
    const std::uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);
    const std::uint32_t quiet = bits | 0x400000;  // a NaN stays one
    bfloats[i] = static_cast<std::uint16_t>(((bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded) >> 16);
  }
}

// One block: the sums of a unit's four rows stay in registers while its entries stream by. Rows come sorted
// by their number of entries, so the loop's length is the same many times in a row and no branch is
// mispredicted per entry. The offsets are read one step ahead: an address that waits for a load holds up the
// loads behind it.
template <class Value, std::size_t kVectors, bool kShared>
void panel_block(const PanelView& w, const PanelBlock& block, bool first, const float* tile, float* sums) {
  constexpr std::size_t kStride = kVectors * kLanes, kOffsets = kShared ? 1 : 4;
  const std::uint16_t* header = w.headers + block.header;
  const std::uint16_t* offset = w.offsets + block.offset;
  const Value* value = static_cast<const Value*>(w.values) + block.value;
  for (std::uint32_t unit = 0; unit < block.units; ++unit, header += kUnitHeader) {
    Floats::Reg sum[4][kVectors];
    float* row[4];
#pragma GCC unroll 4
    for (std::size_t r = 0; r < 4; ++r) {
      row[r] = sums + header[1 + r] * kStride;
#pragma GCC unroll 4
      for (std::size_t v = 0; v < kVectors; ++v)
        sum[r][v] = first ? Floats::zero() : Floats::load(row[r] + v * kLanes);
    }
    const Value* const end = value + 4 * static_cast<std::size_t>(header[0]);
    std::uint64_t next = 0;
    __builtin_memcpy(&next, offset, 2 * kOffsets);
    while (value != end) {
      if constexpr (kVectors <= 2) __builtin_prefetch(reinterpret_cast<const char*>(value) + 2048);
      if constexpr (kVectors == 1) __builtin_prefetch(reinterpret_cast<const char*>(offset) + 1024);
      const std::uint64_t now = next;
      __builtin_memcpy(&next, offset + kOffsets, 2 * kOffsets);
      Floats::Reg weight[4];
      Floats::broadcast4(value, weight);
      if constexpr (kShared) {
        const float* x = tile + static_cast<std::size_t>(now) * kStride;
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
          const float* x = tile + static_cast<std::size_t>(now >> (16 * r) & 0xffff) * kStride;
#pragma GCC unroll 4
          for (std::size_t v = 0; v < kVectors; ++v)
            sum[r][v] = Floats::fma(weight[r], Floats::load(x + v * kLanes), sum[r][v]);
        }
      }
      offset += kOffsets;
      value += 4;
    }
#pragma GCC unroll 4
    for (std::size_t r = 0; r < 4; ++r)
#pragma GCC unroll 4
      for (std::size_t v = 0; v < kVectors; ++v) Floats::store(row[r] + v * kLanes, sum[r][v]);
  }
}

// sums [rows][kVectors * lanes] to row-major y, with bias and activation on the way.
template <std::size_t kVectors>
void unpack_rows(const float* sums, std::size_t first_row, std::size_t rows, std::size_t tokens,
                 Epilogue epilogue, float* y, std::size_t y_stride) {
  constexpr std::size_t kStride = kVectors * kLanes;
  for (std::size_t v = 0; v * kLanes < tokens; ++v) {
    const std::size_t here = tokens - v * kLanes < kLanes ? tokens - v * kLanes : kLanes;
    for (std::size_t m = 0; m < rows; m += kLanes) {
      const std::size_t count = rows - m < kLanes ? rows - m : kLanes;
      Floats::Reg r[kLanes];
#pragma GCC unroll 16
      for (std::size_t i = 0; i < kLanes; ++i)
        r[i] = i < count ? Floats::load(sums + (m + i) * kStride + v * kLanes) : Floats::zero();
      Floats::transpose(r);
      float* to = y + v * kLanes * y_stride + first_row + m;
      for (std::size_t i = 0; i < here; ++i) r[i] = finish_rows(r[i], epilogue, first_row + m, count);
      if (count == kLanes) {
        for (std::size_t i = 0; i < here; ++i) Floats::store(to + i * y_stride, r[i]);
      } else {
        for (std::size_t i = 0; i < here; ++i) Floats::store_partial(to + i * y_stride, r[i], count);
      }
    }
  }
}

// sums [rows][kVectors * lanes] to y that has a row for each of them, with bias and activation on the way.
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
        if (s->count - i >= kLanes)
          Floats::store(to + i, out);
        else
          Floats::store_partial(to + i, out, s->count - i);
      }
    }
  }
}

// All depth blocks of a row block and a tile, into sums.
template <class Value, std::size_t kVectors>
void panel_sums(const PanelView& w, std::size_t row_block, const float* tile, float* sums) {
  for (std::size_t d = 0; d < w.depth_blocks; ++d) {
    const PanelBlock& block = w.blocks[row_block * w.depth_blocks + d];
    const float* part = tile + d * (w.depth + 1) * kVectors * kLanes;
    if (w.shared)
      panel_block<Value, kVectors, true>(w, block, d == 0, part, sums);
    else
      panel_block<Value, kVectors, false>(w, block, d == 0, part, sums);
  }
}

std::size_t rows_of(const PanelView& w, std::size_t row_block) {
  const std::size_t first_row = row_block * kRowBlock;
  return w.rows - first_row < kRowBlock ? w.rows - first_row : kRowBlock;
}

template <class Value, std::size_t kVectors>
void panel_tile(const PanelView& w, std::size_t row_block, const float* tile, std::size_t tokens, float* sums,
                Epilogue epilogue, float* y, std::size_t y_stride) {
  panel_sums<Value, kVectors>(w, row_block, tile, sums);
  unpack_rows<kVectors>(sums, row_block * kRowBlock, rows_of(w, row_block), tokens, epilogue, y, y_stride);
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
  if (vectors == 1)
    panel_tile_across<Value, 1>(w, row_block, tile, sums, epilogue, stretches, n, y, y_stride);
  if (vectors == 2)
    panel_tile_across<Value, 2>(w, row_block, tile, sums, epilogue, stretches, n, y, y_stride);
  if (vectors == 4)
    panel_tile_across<Value, 4>(w, row_block, tile, sums, epilogue, stretches, n, y, y_stride);
}

template <class Value>
void panel(const PanelView& w, std::size_t row_block, const float* tile, std::size_t vectors,
           std::size_t tokens, float* sums, Epilogue epilogue, float* y, std::size_t y_stride) {
  if (vectors == 1) panel_tile<Value, 1>(w, row_block, tile, tokens, sums, epilogue, y, y_stride);
  if (vectors == 2) panel_tile<Value, 2>(w, row_block, tile, tokens, sums, epilogue, y, y_stride);
  if (vectors == 4) panel_tile<Value, 4>(w, row_block, tile, tokens, sums, epilogue, y, y_stride);
}

constexpr MatmulKernels kMatmulKernels = {
    kLanes,
    &pack,
    &gather,
    &widen,
    &narrow,
    {&bitmask<float>, &panel<float>, &panel_across<float>},
    {&bitmask<Bfloat>, &panel<Bfloat>, &panel_across<Bfloat>},
    {&bitmask<Half>, &panel<Half>, &panel_across<Half>},
};

}  // namespace
}  // namespace sparsam::SPARSAM_TARGET
