// Quads of int8 values, over Quads (int8_quads_*.hpp): rows of x in the lanes, four weights of one row of W a
// step. The weights are taken out of slots for every product, which costs what some rows of x cost.
#pragma once
#include "int8-inl.hpp"

namespace sparsam::SPARSAM_TARGET {
namespace {

void make_tile(const std::uint8_t* x, std::size_t x_stride, std::size_t count, std::size_t cols,
               std::uint8_t* to) {
  const std::uint8_t* rows[Quads::kTile];
  for (std::size_t i = 0; i < Quads::kTile; ++i) {
    const std::size_t row = Quads::row(i);
    rows[i] = x + (row < count ? row : count - 1) * x_stride;  // what is too much is computed and left out
  }
  for (std::size_t c = 0; c < cols; c += 16)
    Quads::turn(rows, c, cols - c < 16 ? cols - c : 16, to + c * Quads::kTile);
}

// The weights of some groups of rows, row after row, and in which order these are multiplied: by rising
// length, so that the end of a row is seldom mispredicted.
struct TakenRows {
  static constexpr std::size_t kLanes = Bytes::kLanes, kMost = kQuadGroups * kLanes;
  std::uint32_t first[kMost], quads[kMost];
  std::uint8_t order[kMost];

  TakenRows(const Int8View& w, std::size_t begin, std::size_t end, std::uint16_t* columns,
            std::uint8_t* values) {
    constexpr std::size_t kBytes = int8_pair_bytes(Bytes::kLanes, Bytes::kWindow);
    std::uint32_t at = 0;
    std::size_t n = 0;
    for (std::size_t group = begin; group < end; ++group) {
      const std::uint64_t from = w.begin[group], to = w.begin[group + 1];
      const auto room = static_cast<std::uint32_t>(8 * (to - from) + 8);
      std::uint32_t next[kLanes];
      for (std::size_t i = 0; i < kLanes; ++i, at += room) first[n + i] = next[i] = at;
      for (std::uint64_t pair = from; pair < to; ++pair)
        Quads::take(w.codes + kBytes * pair, w.start + 2 * pair, columns, values, next);
      for (std::size_t i = 0; i < kLanes; ++i, ++n) {  // the last quad is filled with weights of 0
        __builtin_memset(columns + next[i], 0, 4 * sizeof *columns);
        __builtin_memset(values + next[i], 0, 4);
        quads[n] = (next[i] - first[n] + 3) / 4;
        std::size_t place = n;
        for (; place > 0 && quads[order[place - 1]] > quads[n]; --place) order[place] = order[place - 1];
        order[place] = static_cast<std::uint8_t>(n);
      }
    }
  }
};

void multiply_quads(const Int8View& w, std::size_t begin, std::size_t end, const std::uint8_t* tiles,
                    const float* x_scale, std::size_t batch, void* room, const Epilogue& epilogue,
                    const Output& y) {
  constexpr std::size_t kTile = Quads::kTile;
  SPARSAM_CHECK(end - begin <= kQuadGroups && w.lanes == Bytes::kLanes && w.window == Bytes::kWindow);
  SPARSAM_CHECK((w.cols - 1) * kQuadStep <= UINT16_MAX);
  const std::size_t lanes = (end - begin) * Bytes::kLanes, lane = begin * Bytes::kLanes;
  auto* const sums = static_cast<std::int32_t*>(room);
  auto* const columns = reinterpret_cast<std::uint16_t*>(sums + lanes * kTile);
  auto* const values = reinterpret_cast<std::uint8_t*>(
      columns + 8 * Bytes::kLanes * (w.begin[end] - w.begin[begin]) + 8 * lanes);
  const TakenRows taken(w, begin, end, columns, values);
  for (std::size_t from = 0; from < batch; from += kTile, tiles += w.cols * kTile) {
    for (std::size_t i = 0; i < lanes; ++i) {
      const std::size_t n = taken.order[i];
      Quads::add(columns + taken.first[n], values + taken.first[n], taken.quads[n], tiles, w.first[lane + n],
                 sums + n * kTile);
    }
    for (std::size_t t = 0; t < kTile && from + t < batch; t += kLanes) {
      const Output to = row_of(y, from + t);
      const Int8Rows rows{w.rows, w.row, w.scale, epilogue, to};
      const std::size_t count = batch - from - t < kLanes ? batch - from - t : kLanes;
      for (std::size_t n = 0; n < lanes; n += kLanes) {
        Floats::Reg turned[kLanes];
        float floats[kLanes * kLanes];
        for (std::size_t i = 0; i < kLanes; ++i) turned[i] = Quads::to_floats(sums + (n + i) * kTile + t);
        Floats::transpose(turned);
        for (std::size_t i = 0; i < kLanes; ++i) Floats::store(floats + i * kLanes, turned[i]);
        rows.finish(lane + n, floats, kLanes, x_scale + from + t, count);
      }
    }
  }
}

}  // namespace
}  // namespace sparsam::SPARSAM_TARGET
