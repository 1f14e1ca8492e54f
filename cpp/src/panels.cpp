// The panel form: built from a bitmask, turned back into one, and checked.
#include <cstring>

#include "forms.hpp"
#include "sparsam/masks.hpp"

namespace sparsam {
namespace {

// Deep blocks if rows have few entries, since loading and storing sums would take most of the time; otherwise
// blocks whose part of a tile of four AVX-512 vectors (32 KiB) stays in the L1 cache, and whose column
// numbers fit one byte. Measured on Zen 5 with AVX-512 and AVX2: benchmarks/bench_matmul.py.
std::size_t depth_for(const Form& w) {
  const double weights = static_cast<double>(w.rows()) * static_cast<double>(w.cols());
  return static_cast<double>(w.nnz()) < 0.12 * weights ? 256 : 128;
}

// The number of entries of each row of one block, and the order of the rows in its units.
class BlockRows {
 public:
  BlockRows(std::size_t rows, bool shared, bool first) : rows_(rows), shared_(shared), first_(first) {}

  // A stable counting sort; rows that share columns are equally long, so they stay together.
  void order(const std::uint16_t* entries) {
    entries_ = entries;
    const std::size_t missing = (4 - rows_ % 4) % 4;
    end_ = rows_ + missing;
    for (std::size_t i = 0; i < missing; ++i) order_[i] = kRowBlock;
    if (shared_) {
      for (std::size_t r = 0; r < rows_; ++r) order_[r] = static_cast<std::uint16_t>(r);
      return;
    }
    std::uint16_t starts[kMaxDepth + 2] = {};
    for (std::size_t r = 0; r < rows_; ++r) ++starts[entries[r] + 1];
    starts[0] = static_cast<std::uint16_t>(missing);
    for (std::size_t n = 0; n <= kMaxDepth; ++n)
      starts[n + 1] = static_cast<std::uint16_t>(starts[n + 1] + starts[n]);
    for (std::size_t r = 0; r < rows_; ++r) order_[starts[entries[r]]++] = static_cast<std::uint16_t>(r);
  }

  // Calls visit(at, steps) for each unit; `at` is the position of its first row in the order.
  template <class Visit>
  void for_each_unit(Visit&& visit) const {
    for (std::size_t at = 0; at < end_; at += 4)
      if (const std::size_t n = steps(at); n > 0 || first_) visit(at, n);
  }

  std::size_t row(std::size_t at) const { return order_[at]; }

 private:
  std::size_t steps(std::size_t at) const {  // the longest row comes last
    return entries_[order_[at + 3]];
  }

  std::size_t rows_, end_ = 0;
  bool shared_, first_;
  const std::uint16_t* entries_ = nullptr;
  std::uint16_t order_[kRowBlock];
};

struct PanelBuilder {
  const BitmaskView w;
  const std::size_t depth, down, across;
  const bool shared;

  std::size_t rows_of(std::size_t row_block) const {
    return std::min(kRowBlock, w.rows - row_block * kRowBlock);
  }
  std::size_t first_word(std::size_t d) const { return std::min(d * (depth / 64), w.row_words); }
  const std::uint64_t* words_of(std::size_t row_block, std::size_t r) const {
    return w.words + (row_block * kRowBlock + r) * w.row_words;
  }

  // entries[block][kRowBlock], and the units and steps of each block.
  void count(std::size_t block, std::uint16_t* entries, PanelBlock* counts) const {
    const std::size_t row_block = block / across, d = block % across;
    const std::size_t begin = first_word(d), n = first_word(d + 1) - begin;
    for (std::size_t r = 0; r < rows_of(row_block); ++r)
      entries[r] = static_cast<std::uint16_t>(count_words(words_of(row_block, r) + begin, n));
    BlockRows rows(rows_of(row_block), shared, d == 0);
    rows.order(entries);
    *counts = {0, 0};
    rows.for_each_unit([&](std::size_t, std::size_t steps) {
      ++counts->unit;
      counts->step += steps;
    });
  }

  // `values` points to the next values of each row, and is advanced past those of the block.
  template <class Value, class Offset>
  void emit(std::size_t block, const std::uint16_t* entries, const Value** values, std::uint16_t* header,
            Offset* offset, Value* value) const {
    const std::size_t row_block = block / across, d = block % across;
    const std::size_t begin = first_word(d), end = first_word(d + 1), lanes = shared ? 1 : 4;
    BlockRows rows(rows_of(row_block), shared, d == 0);
    rows.order(entries);
    rows.for_each_unit([&](std::size_t at, std::size_t steps) {
      *header++ = static_cast<std::uint16_t>(steps);
      for (std::size_t i = 0; i < 4; ++i) *header++ = static_cast<std::uint16_t>(rows.row(at + i));
      for (std::size_t i = 0; i < 4; ++i) {
        Offset* o = shared ? offset : offset + i;
        Value* v = value + i;
        if (const std::size_t r = rows.row(at + i); r != kRowBlock) {
          const Value* from = values[r];
          for_each_bit(words_of(row_block, r), begin, end, [&](std::size_t c) {
            *o = static_cast<Offset>(c - begin * 64);
            *v = *from++;
            o += lanes;
            v += 4;
          });
          values[r] = from;
        }
        for (; v < value + 4 * steps; v += 4, o += lanes) {
          *v = 0;
          *o = static_cast<Offset>(depth);
        }
      }
      offset += lanes * steps;
      value += 4 * steps;
    });
  }
};

// Calls body with values of the types of weights and of offsets.
template <class Body>
void with_types(std::size_t value_bytes, std::size_t depth, Body&& body) {
  with_bits(value_bytes, [&](auto value) {
    if (offset_bytes(depth) == 1)
      body(value, std::uint8_t{});
    else
      body(value, std::uint16_t{});
  });
}

// Iterates over the entries of a form in panels, block by block.
template <class Value, class Offset>
struct PanelReader {
  const PanelView& w;

  std::size_t lanes() const { return w.shared ? 1 : 4; }

  // visit(r, entries, offsets, values): row r of the row block has that many entries in block d; their
  // offsets are lanes() apart, their values 4.
  template <class Visit>
  void for_each_row(std::size_t row_block, std::size_t d, Visit&& visit) const {
    const PanelBlock* const block = w.blocks + row_block * w.depth_blocks + d;
    const std::uint16_t* header = w.headers + kUnitHeader * block->unit;
    const Offset* offset = static_cast<const Offset*>(w.offsets) + lanes() * block->step;
    const Value* value = static_cast<const Value*>(w.values) + 4 * block->step;
    for (std::uint64_t unit = block[0].unit; unit < block[1].unit; ++unit, header += kUnitHeader) {
      for (std::size_t i = 0; i < 4; ++i) {
        const Offset* const first = w.shared ? offset : offset + i;
        std::size_t n = header[0];
        while (n > 0 && first[(n - 1) * lanes()] == w.depth) --n;
        if (header[1 + i] != kRowBlock) visit(header[1 + i], n, first, value + i);
      }
      offset += lanes() * header[0];
      value += 4 * header[0];
    }
  }
};

std::size_t row_blocks(const PanelView& w) { return (w.rows + kRowBlock - 1) / kRowBlock; }

// Checks one row block; returns an empty text if nothing is wrong. Adds its entries to the total.
template <class Value, class Offset>
std::string fault_of_row_block(const PanelView& w, std::size_t row_block, std::uint64_t* nnz) {
  const std::size_t rows = std::min(kRowBlock, w.rows - row_block * kRowBlock), lanes = w.shared ? 1 : 4;
  for (std::size_t d = 0; d < w.depth_blocks; ++d) {
    const std::size_t columns = std::min(w.depth, w.cols - d * w.depth);
    const PanelBlock* const block = w.blocks + row_block * w.depth_blocks + d;
    const std::uint16_t* header = w.headers + kUnitHeader * block->unit;
    const Offset* offset = static_cast<const Offset*>(w.offsets) + lanes * block->step;
    const Value* value = static_cast<const Value*>(w.values) + 4 * block->step;
    std::uint64_t steps = block->step;
    bool seen[kRowBlock] = {};
    std::size_t n_seen = 0;
    for (std::uint64_t unit = block[0].unit; unit < block[1].unit; ++unit, header += kUnitHeader) {
      if (header[0] > w.depth || header[0] > block[1].step - steps) return "a unit has too many steps";
      for (std::size_t i = 0; i < 4; ++i) {
        const std::size_t r = header[1 + i];
        const bool none = r == kRowBlock;
        if ((!none && (r >= rows || seen[r])) ||
            (w.shared && (none || r % 4 != i || (i > 0 && r != header[i] + 1u))))
          return "a unit has rows that it cannot have";
        if (!none) seen[r] = true;
        n_seen += none ? 0 : 1;
        const Offset* const o = w.shared ? offset : offset + i;
        std::size_t entries = header[0];
        while (entries > 0 && o[(entries - 1) * lanes] == w.depth) --entries;
        if ((none && entries > 0) || (w.shared && entries < header[0]))
          return "an entry has no row or no column";
        for (std::size_t k = 0; k < entries; ++k)
          if (o[k * lanes] >= columns || (k > 0 && o[k * lanes] <= o[(k - 1) * lanes]))
            return "the columns of a row are not in order, or are too many";
        for (std::size_t k = entries; k < header[0]; ++k)
          if (value[4 * k + i] != 0) return "what pads a unit is not 0";
        *nnz += entries;
      }
      steps += header[0];
      offset += lanes * header[0];
      value += 4 * header[0];
    }
    if (steps != block[1].step) return "a block has steps in no unit";
    if (d == 0 && n_seen != rows) return "a row is missing";
  }
  return {};
}

}  // namespace

FormPtr panels_of(const Form& bitmask) {
  const BitmaskView w = bitmask.bitmask();
  const std::size_t depth = depth_for(bitmask), down = (w.rows + kRowBlock - 1) / kRowBlock,
                    across = panel_depth_blocks(w.cols, depth), n = down * across;
  const PanelBuilder builder{w, depth, down, across, bitmask.header().shared_rows != 0};
  const Memory entries(n * kRowBlock * sizeof(std::uint16_t)), starts((n + 1) * sizeof(PanelBlock));
  auto* const entries_of = entries.as<std::uint16_t>();
  auto* const blocks = starts.as<PanelBlock>();
  const bool parallel = w.rows * w.cols >= kSerialBelow;
  for_each_task(n, worker_count(n, parallel), [&](std::size_t, std::size_t block) {
    builder.count(block, entries_of + block * kRowBlock, blocks + block);
  });
  PanelBlock at{0, 0};
  for (std::size_t block = 0; block <= n; ++block) {
    const PanelBlock counts = block < n ? blocks[block] : PanelBlock{0, 0};
    blocks[block] = at;
    at = {at.unit + counts.unit, at.step + counts.step};
  }
  FormHeader counts =
      header_for(FormKind::panels, bitmask.dtype(), bitmask.rows(), bitmask.cols(), bitmask.nnz());
  counts.shared_rows = bitmask.header().shared_rows;
  counts.depth = depth;
  counts.units = at.unit;
  counts.steps = at.step;
  const FormWriter writer(counts);
  std::copy_n(blocks, n + 1, writer.section<PanelBlock>(0));
  // A task is a range of depth blocks of a row block; it first finds where its rows start in them.
  constexpr std::size_t kStretch = 8;
  const std::size_t stretches = (across + kStretch - 1) / kStretch, lanes = builder.shared ? 1 : 4;
  with_types(item_size(bitmask.dtype()), depth, [&](auto value, auto offset) {
    using Value = decltype(value);
    using Offset = decltype(offset);
    for_each_task(down * stretches, worker_count(down * stretches, parallel),
                  [&](std::size_t, std::size_t task) {
                    const std::size_t row_block = task / stretches, first = task % stretches * kStretch;
                    const Value* values[kRowBlock];
                    for (std::size_t r = 0; r < builder.rows_of(row_block); ++r) {
                      std::uint64_t before = w.row_start[row_block * kRowBlock + r];
                      for (std::size_t d = 0; d < first; ++d)
                        before += entries_of[(row_block * across + d) * kRowBlock + r];
                      values[r] = static_cast<const Value*>(w.values) + before;
                    }
                    for (std::size_t d = first; d < std::min(across, first + kStretch); ++d) {
                      const std::size_t block = row_block * across + d;
                      builder.emit(block, entries_of + block * kRowBlock, values,
                                   writer.section<std::uint16_t>(1) + kUnitHeader * blocks[block].unit,
                                   writer.section<Offset>(2) + lanes * blocks[block].step,
                                   writer.section<Value>(3) + 4 * blocks[block].step);
                    }
                  });
  });
  return writer.finish();
}

FormPtr bitmask_of_panels(const Form& panels) {
  const PanelView w = panels.panels();
  const std::size_t row_words = words_for(w.cols), down = row_blocks(w);
  FormHeader counts =
      header_for(FormKind::bitmask, panels.dtype(), panels.rows(), panels.cols(), panels.nnz());
  counts.shared_rows = panels.header().shared_rows;
  const FormWriter writer(counts);
  auto* const words = writer.section<std::uint64_t>(0);
  auto* const starts = writer.section<std::uint64_t>(1);
  const std::size_t workers = worker_count(down, w.rows * w.cols >= kSerialBelow);
  with_types(item_size(panels.dtype()), w.depth, [&](auto value, auto offset) {
    using Value = decltype(value);
    using Offset = decltype(offset);
    const PanelReader<Value, Offset> reader{w};
    for_each_task(down, workers, [&](std::size_t, std::size_t row_block) {
      const std::size_t first = row_block * kRowBlock, rows = std::min(kRowBlock, w.rows - first);
      std::fill_n(words + first * row_words, rows * row_words, 0);
      std::fill_n(starts + first + 1, rows, 0);
      for (std::size_t d = 0; d < w.depth_blocks; ++d)
        reader.for_each_row(row_block, d, [&](std::size_t r, std::size_t n, const Offset* o, const Value*) {
          std::uint64_t* const to = words + (first + r) * row_words + d * (w.depth / 64);
          for (std::size_t k = 0; k < n; ++k, o += reader.lanes()) to[*o / 64] |= std::uint64_t{1} << *o % 64;
          starts[first + r + 1] += n;
        });
    });
    starts[0] = 0;
    for (std::size_t r = 0; r < w.rows; ++r) starts[r + 1] += starts[r];
    for_each_task(down, workers, [&](std::size_t, std::size_t row_block) {
      const std::size_t first = row_block * kRowBlock;
      Value* next[kRowBlock];
      for (std::size_t r = 0; r < std::min(kRowBlock, w.rows - first); ++r)
        next[r] = writer.section<Value>(2) + starts[first + r];
      for (std::size_t d = 0; d < w.depth_blocks; ++d)
        reader.for_each_row(row_block, d, [&](std::size_t r, std::size_t n, const Offset*, const Value* v) {
          for (std::size_t k = 0; k < n; ++k) *next[r]++ = v[4 * k];
        });
    });
  });
  return writer.finish();
}

std::string fault_of(const PanelView& w, const FormHeader& header) {
  const std::size_t n = panel_blocks(w.rows, w.cols, w.depth);
  if (w.blocks[0].unit != 0 || w.blocks[0].step != 0 || w.blocks[n].unit != header.units ||
      w.blocks[n].step != header.steps)
    return "expected blocks from the first unit to the last";
  for (std::size_t i = 0; i < n; ++i)
    if (w.blocks[i].unit > w.blocks[i + 1].unit || w.blocks[i].step > w.blocks[i + 1].step)
      return "expected blocks in order";
  std::string fault;
  std::uint64_t nnz = 0;
  with_types(item_size(static_cast<DType>(header.dtype)), w.depth, [&](auto value, auto offset) {
    for (std::size_t r = 0; r < row_blocks(w) && fault.empty(); ++r)
      fault = fault_of_row_block<decltype(value), decltype(offset)>(w, r, &nnz);
  });
  if (fault.empty() && nnz != header.nnz) fault = "expected as many entries as its header says";
  return fault;
}

}  // namespace sparsam
