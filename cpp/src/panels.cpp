#include "panels.hpp"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "chunks.hpp"

namespace sparsam {
namespace {

// The rows of one block, four to a unit.
class BlockRows {
 public:
  BlockRows(const BitmaskView& w, std::size_t row_block, std::size_t depth, bool shared)
      : w_(w),
        first_row_(row_block * kRowBlock),
        rows_(std::min(kRowBlock, w.rows - first_row_)),
        depth_words_(depth / 64),
        shared_(shared) {
    for (std::size_t r = 0; r < rows_; ++r) cursor_[r] = w.row_start[first_row_ + r];
  }

  // Goes to a depth block and orders its rows; call for 0, 1, 2, ... in turn.
  void enter(std::size_t depth_block) {
    begin_ = depth_block * depth_words_;
    end_ = std::min(begin_ + depth_words_, w_.row_words);
    for (std::size_t r = 0; r < rows_; ++r) {
      if (depth_block > 0) cursor_[r] += count_[r];
      count_[r] = 0;
      for (std::size_t k = begin_; k < end_; ++k)
        count_[r] += static_cast<std::size_t>(__builtin_popcountll(words_of(r)[k]));
    }
    order_.resize(rows_);
    std::iota(order_.begin(), order_.end(), 0);
    if (!shared_) {  // rows that share columns stay together, and are equally long anyway
      std::stable_sort(order_.begin(), order_.end(), [&](int a, int b) { return count_[a] < count_[b]; });
      while (order_.size() % 4 != 0) order_.insert(order_.begin(), static_cast<std::uint16_t>(kRowBlock));
    }
    if (depth_block == 0)
      return;  // the first block sets every sum, the others need only rows that have entries
    std::size_t empty = 0;
    for (std::size_t u = 0; u < order_.size(); u += 4) {
      if (steps(u) == 0) {
        ++empty;
      } else if (empty > 0) {
        std::copy_n(order_.begin() + static_cast<std::ptrdiff_t>(u), 4,
                    order_.begin() + static_cast<std::ptrdiff_t>(u - 4 * empty));
      }
    }
    order_.resize(order_.size() - 4 * empty);
  }

  std::size_t units() const { return order_.size() / 4; }
  std::size_t total_steps() const {
    std::size_t n = 0;
    for (std::size_t u = 0; u < order_.size(); u += 4) n += steps(u);
    return n;
  }

  void emit(std::size_t depth, std::size_t value_bytes, std::uint16_t* header, std::uint16_t* offset,
            char* value) const {
    for (std::size_t u = 0; u < order_.size(); u += 4) {
      const std::size_t n = steps(u);
      *header++ = static_cast<std::uint16_t>(n);
      for (std::size_t r = 0; r < 4; ++r) *header++ = order_[u + r];
      const std::size_t stride = shared_ ? 1 : 4;
      for (std::size_t r = 0; r < 4; ++r) {
        const std::size_t row = order_[u + r];
        const std::size_t entries = row == kRowBlock ? 0 : count_[row];
        if (entries > 0)
          emit_row(row, stride, shared_ ? offset : offset + r, value_bytes, value + r * value_bytes);
        for (std::size_t i = entries; i < n; ++i) {
          offset[i * stride + (shared_ ? 0 : r)] = static_cast<std::uint16_t>(depth);
          std::memset(value + (4 * i + r) * value_bytes, 0, value_bytes);
        }
      }
      offset += stride * n;
      value += 4 * n * value_bytes;
    }
  }

 private:
  const std::uint64_t* words_of(std::size_t row) const {
    return w_.words + (first_row_ + row) * w_.row_words;
  }

  std::size_t steps(std::size_t unit) const {
    std::size_t n = 0;
    for (std::size_t r = 0; r < 4; ++r)
      if (order_[unit + r] != kRowBlock) n = std::max(n, count_[order_[unit + r]]);
    return n;
  }

  void emit_row(std::size_t row, std::size_t stride, std::uint16_t* offset, std::size_t value_bytes,
                char* value) const {
    const char* from = static_cast<const char*>(w_.values) + cursor_[row] * value_bytes;
    for (std::size_t k = begin_; k < end_; ++k) {
      for (std::uint64_t bits = words_of(row)[k]; bits != 0; bits &= bits - 1) {
        *offset =
            static_cast<std::uint16_t>((k - begin_) * 64 + static_cast<std::size_t>(__builtin_ctzll(bits)));
        if (value_bytes == 4)
          std::memcpy(value, from, 4);
        else
          std::memcpy(value, from, 2);
        offset += stride;
        value += 4 * value_bytes;
        from += value_bytes;
      }
    }
  }

  const BitmaskView& w_;
  std::size_t first_row_, rows_, depth_words_;
  bool shared_;
  std::size_t begin_ = 0, end_ = 0;
  std::size_t count_[kRowBlock] = {};
  std::uint64_t cursor_[kRowBlock] = {};
  std::vector<std::uint16_t> order_;
};

}  // namespace

Panels build_panels(const BitmaskView& w, std::size_t value_bytes, std::size_t depth, bool shared) {
  Panels p{depth, shared, {}, {}, {}, {}};
  const std::size_t down = (w.rows + kRowBlock - 1) / kRowBlock,
                    across = std::max<std::size_t>(1, (w.cols + depth - 1) / depth);
  const std::size_t workers = worker_count(down, w.rows * w.cols >= kSerialBelow);
  p.blocks.resize(down * across);
  std::vector<std::size_t> steps(down * across);
  for_each_task(down, workers, [&](std::size_t, std::size_t row_block) {
    BlockRows rows(w, row_block, depth, shared);
    for (std::size_t d = 0; d < across; ++d) {
      rows.enter(d);
      p.blocks[row_block * across + d].units = static_cast<std::uint32_t>(rows.units());
      steps[row_block * across + d] = rows.total_steps();
    }
  });
  std::size_t headers = 0, all_steps = 0;
  const std::size_t per_step = shared ? 1 : 4;
  for (std::size_t i = 0; i < p.blocks.size(); ++i) {
    p.blocks[i].header = headers;
    p.blocks[i].offset = per_step * all_steps;
    p.blocks[i].value = 4 * all_steps;
    headers += kUnitHeader * p.blocks[i].units;
    all_steps += steps[i];
  }
  p.headers.resize(headers);
  p.offsets = Memory::readable_past(2 * per_step * all_steps);
  p.values = Memory::readable_past(4 * all_steps * value_bytes);
  for_each_task(down, workers, [&](std::size_t, std::size_t row_block) {
    BlockRows rows(w, row_block, depth, shared);
    for (std::size_t d = 0; d < across; ++d) {
      rows.enter(d);
      const PanelBlock& b = p.blocks[row_block * across + d];
      rows.emit(depth, value_bytes, p.headers.data() + b.header, p.offsets.as<std::uint16_t>() + b.offset,
                p.values.as<char>() + b.value * value_bytes);
    }
  });
  return p;
}

}  // namespace sparsam
