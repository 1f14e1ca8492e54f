// The form in slots: built from a bitmask, turned back into one, and checked.
#include <limits>
#include <stdexcept>
#include <vector>

#include "forms.hpp"
#include "slot_steps.hpp"
#include "sparsam/errors.hpp"
#include "sparsam/isa.hpp"
#include "sparsam/masks.hpp"
#include "table.hpp"

namespace sparsam {
namespace {

// A form stores a value for every slot, which is fastest to read, if it fits the caches and most of its slots
// are used; otherwise reading the additional memory would take longer than expanding. Measured on Zen 4.
constexpr std::size_t kMaxFullBytes = std::size_t{8} << 20;  // bytes of values
constexpr double kMinFullShare = 0.55;                       // of the slots

constexpr std::size_t kMaxGap = 255;  // starts are counted from that of the step before, in a byte

// Bits of a step's word that give a slot's column: eight slots have three each, and above them their used
// bits; sixteen have four, so that slots 2 i and 2 i + 1 are i-th in the lower and in the upper half.
constexpr std::size_t slot_shift(std::size_t depth, std::size_t slot) {
  return depth == 8 ? 3 * slot : slot % 2 * 32 + slot / 2 * 4;
}

std::size_t blocks_of(std::size_t rows) { return (rows + kSlotBlock - 1) / kSlotBlock; }

// Memory for a worker that distributes the rows of one block.
class SlotBlock {
 public:
  SlotBlock(const BitmaskView& w, std::size_t depth) : w_(w), depth_(depth) {}

  std::size_t positions() const { return positions_; }
  std::size_t groups() const { return positions_ / depth_; }
  std::uint8_t row(std::size_t position) const { return order_[position]; }

  // The order of the block's rows: by their number of entries, after the positions without a row that
  // complete the last group.
  void begin(std::size_t block) {
    first_ = block * kSlotBlock;
    const std::size_t rows = std::min(kSlotBlock, w_.rows - first_);
    positions_ = slot_groups(rows, depth_) * depth_;
    const std::size_t missing = positions_ - rows;
    std::fill_n(order_, missing, static_cast<std::uint8_t>(kSlotBlock));
    for (std::size_t r = 0; r < rows; ++r) order_[missing + r] = static_cast<std::uint8_t>(r);
    std::stable_sort(order_ + missing, order_ + positions_,
                     [&](std::uint8_t a, std::uint8_t b) { return entries(a) < entries(b); });
  }

  // Distributes group g over steps, as visit(start, taken, columns, values), where slot i holds the last of
  // the taken[i] entries before columns[i].next, if any, whose value is the one before values[i]. Returns the
  // entries.
  template <class Value, class Visit>
  std::size_t deal(std::size_t g, const Value* all, Visit&& visit) {
    SlotRow rows[kMaxSlotRows];
    const Value* values[kMaxSlotRows] = {};
    std::size_t starts[kMaxSlotRows + 1] = {};
    for (std::size_t i = 0; i < depth_; ++i) {
      const std::size_t r = order_[g * depth_ + i];
      starts[i + 1] = starts[i] + (r == kSlotBlock ? 0 : entries(r));
    }
    columns_.resize(starts[depth_]);
    for (std::size_t i = 0; i < depth_; ++i) {
      std::uint32_t* const begin = columns_.data() + starts[i];
      rows[i] = {begin, begin + (starts[i + 1] - starts[i])};
      const std::size_t r = order_[g * depth_ + i];
      if (r == kSlotBlock) continue;
      std::uint32_t* to = begin;
      for_each_bit(w_.words + (first_ + r) * w_.row_words, 0, w_.row_words,
                   [&](std::size_t c) { *to++ = static_cast<std::uint32_t>(c); });
      values[i] = all + w_.row_start[first_ + r];
    }
    const SlotShape shape{depth_, 1, depth_, kMaxGap};
    for_each_step(shape, rows, depth_, w_.cols, [&](std::size_t start, const std::uint8_t* taken) {
      for (std::size_t i = 0; i < depth_; ++i)
        if (taken[i] != 0) ++values[i];
      visit(start, taken, rows, values);
    });
    return starts[depth_];
  }

 private:
  std::uint64_t entries(std::size_t r) const {
    return w_.row_start[first_ + r + 1] - w_.row_start[first_ + r];
  }

  const BitmaskView& w_;
  std::size_t depth_, first_ = 0, positions_ = 0;
  std::uint8_t order_[kSlotBlock];
  std::vector<std::uint32_t> columns_;
};

// Iterates over the used slots of a form, step by step.
struct SlotReader {
  const SlotView& w;

  std::uint64_t word(std::size_t step) const {
    return w.depth == 8 ? static_cast<const std::uint32_t*>(w.words)[step]
                        : static_cast<const std::uint64_t*>(w.words)[step];
  }
  std::uint32_t used(std::size_t step) const {
    return w.depth == 8 ? static_cast<std::uint32_t>(word(step) >> 24) : w.used[step];
  }
  std::size_t offset(std::size_t step, std::size_t slot) const {
    return word(step) >> slot_shift(w.depth, slot) & (w.depth - 1);
  }
  // The index of the row in its block; kSlotBlock for none.
  std::size_t row(std::size_t g, std::size_t slot) const { return w.order[g * w.depth + slot]; }
  std::size_t first_row(std::size_t g) const { return g * w.depth / kSlotBlock * kSlotBlock; }

  // visit(slot, column, value's number) for the entries of a group, step by step.
  template <class Visit>
  void for_each(std::size_t g, Visit&& visit) const {
    std::size_t start = 0, value = w.groups[g].value;
    for (std::size_t step = w.groups[g].step; step < w.groups[g + 1].step; ++step) {
      start += w.starts[step];
      for (std::uint32_t bits = used(step); bits != 0; bits &= bits - 1) {
        const auto slot = static_cast<std::size_t>(__builtin_ctz(bits));
        visit(slot, start + offset(step, slot), w.full ? step * w.depth + slot : value++);
      }
    }
  }
};

// Checks one group. Adds its entries to the total.
std::string fault_of_group(const SlotView& w, std::size_t g, std::uint64_t* nnz) {
  const SlotReader reader{w};
  const std::size_t last = w.cols < w.depth ? 0 : w.cols - w.depth;
  std::size_t start = 0, entries = 0, end[kMaxSlotRows] = {};
  for (std::size_t step = w.groups[g].step; step < w.groups[g + 1].step; ++step) {
    start += w.starts[step];
    if (start > last) return "a step begins past the last column";
    for (std::size_t slot = 0; slot < w.depth; ++slot) {
      const bool used = (reader.used(step) >> slot & 1) != 0;
      const std::size_t column = start + reader.offset(step, slot);
      if (!used && reader.offset(step, slot) != 0) return "a slot that is not used has a column";
      if (!used) continue;
      if (column >= w.cols || column < end[slot] || reader.row(g, slot) == kSlotBlock)
        return "an entry has no row or no column, or the columns of a row are not in order";
      end[slot] = column + 1;
      ++entries;
    }
  }
  const std::size_t values = w.full ? (w.groups[g + 1].step - w.groups[g].step) * w.depth : entries;
  *nnz += entries;
  return values == w.groups[g + 1].value - w.groups[g].value ? std::string()
                                                             : "a group has other values than slots";
}

std::string fault_of_order(const SlotView& w) {
  const std::size_t positions = slot_groups(w.rows, w.depth) * w.depth;
  for (std::size_t first = 0; first < positions; first += kSlotBlock) {
    const std::size_t rows = std::min(kSlotBlock, w.rows - first);
    bool seen[kSlotBlock] = {};
    std::size_t n = 0;
    for (std::size_t i = first; i < std::min(positions, first + kSlotBlock); ++i) {
      const std::size_t r = w.order[i];
      if (r == kSlotBlock) continue;
      if (r >= rows || seen[r]) return "a block has rows that it cannot have";
      seen[r] = true;
      ++n;
    }
    if (n != rows) return "a row is missing";
  }
  return {};
}

}  // namespace

FormPtr slots_of(const Form& bitmask) {
  const BitmaskView w = bitmask.bitmask();
  if (w.cols > std::numeric_limits<std::uint32_t>::max())
    throw std::invalid_argument(expected("form 'slots'", w.cols, "less than 2^32 columns", "use bitmask"));
  const std::size_t depth = kernels().matmul.lanes, blocks = blocks_of(w.rows),
                    groups = slot_groups(w.rows, depth), per_block = kSlotBlock / depth;
  const std::size_t workers = worker_count(blocks, w.rows * w.cols >= kSerialBelow);
  const Memory counted((groups + 1) * sizeof(SlotStart));
  auto* const starts = counted.as<SlotStart>();
  for_each_task(blocks, workers, [&](std::size_t, std::size_t block) {
    SlotBlock rows(w, depth);
    rows.begin(block);
    for (std::size_t g = 0; g < rows.groups(); ++g) {
      SlotStart& counts = starts[block * per_block + g];
      counts.step = 0;
      counts.value = rows.deal(g, static_cast<const char*>(w.values), [&](auto&&...) { ++counts.step; });
    }
  });
  std::size_t steps = 0;
  for (std::size_t g = 0; g < groups; ++g) steps += starts[g].step;
  const bool full = steps * depth * item_size(bitmask.dtype()) <= kMaxFullBytes &&
                    static_cast<double>(bitmask.nnz()) >= kMinFullShare * static_cast<double>(steps * depth);
  SlotStart at{0, 0};
  for (std::size_t g = 0; g <= groups; ++g) {
    const SlotStart counts = g < groups ? starts[g] : SlotStart{0, 0};
    starts[g] = at;
    at = {at.step + counts.step, at.value + (full ? counts.step * depth : counts.value)};
  }
  FormHeader counts = header_for(FormKind::slots, bitmask.dtype(), w.rows, w.cols, bitmask.nnz());
  counts.shared_rows = bitmask.header().shared_rows;
  counts.depth = depth;
  counts.steps = at.step;
  counts.units = at.value;
  const FormWriter writer(counts);
  std::copy_n(starts, groups + 1, writer.section<SlotStart>(0));
  with_bits(item_size(bitmask.dtype()), [&](auto width) {
    using Value = decltype(width);
    for_each_task(blocks, workers, [&](std::size_t, std::size_t block) {
      SlotBlock rows(w, depth);
      rows.begin(block);
      for (std::size_t i = 0; i < rows.positions(); ++i)
        writer.section<std::uint8_t>(1)[block * kSlotBlock + i] = rows.row(i);
      for (std::size_t g = 0; g < rows.groups(); ++g) {
        std::size_t step = starts[block * per_block + g].step, before = 0;
        Value* value = writer.section<Value>(5) + starts[block * per_block + g].value;
        rows.deal(g, static_cast<const Value*>(w.values),
                  [&](std::size_t start, const std::uint8_t* taken, const SlotRow* row, const Value** next) {
                    std::uint64_t word = 0, used = 0;
                    for (std::size_t i = 0; i < depth; ++i) {
                      if (taken[i] == 0) {
                        if (full) *value++ = 0;
                        continue;
                      }
                      word |= static_cast<std::uint64_t>(row[i].next[-1] - start) << slot_shift(depth, i);
                      used |= std::uint64_t{1} << i;
                      *value++ = next[i][-1];
                    }
                    writer.section<std::uint8_t>(4)[step] = static_cast<std::uint8_t>(start - before);
                    if (depth == 8) {
                      writer.section<std::uint32_t>(2)[step] = static_cast<std::uint32_t>(word | used << 24);
                    } else {
                      writer.section<std::uint64_t>(2)[step] = word;
                      writer.section<std::uint16_t>(3)[step] = static_cast<std::uint16_t>(used);
                    }
                    before = start;
                    ++step;
                  });
      }
    });
  });
  return writer.finish();
}

FormPtr bitmask_of_slots(const Form& slots) {
  const SlotView w = slots.slots();
  const SlotReader reader{w};
  const std::size_t row_words = words_for(w.cols), blocks = blocks_of(w.rows),
                    per_block = kSlotBlock / w.depth;
  FormHeader counts = header_for(FormKind::bitmask, slots.dtype(), slots.rows(), slots.cols(), slots.nnz());
  counts.shared_rows = slots.header().shared_rows;
  const FormWriter writer(counts);
  auto* const words = writer.section<std::uint64_t>(0);
  auto* const starts = writer.section<std::uint64_t>(1);
  const std::size_t workers = worker_count(blocks, w.rows * w.cols >= kSerialBelow),
                    groups = slot_groups(w.rows, w.depth);
  const auto each_group = [&](auto&& body) {
    for_each_task(blocks, workers, [&](std::size_t, std::size_t block) {
      for (std::size_t g = block * per_block; g < std::min(groups, (block + 1) * per_block); ++g) body(g);
    });
  };
  std::fill_n(words, w.rows * row_words, 0);
  std::fill_n(starts, w.rows + 1, 0);
  each_group([&](std::size_t g) {
    reader.for_each(g, [&](std::size_t slot, std::size_t column, std::size_t) {
      const std::size_t row = reader.first_row(g) + reader.row(g, slot);
      words[row * row_words + column / 64] |= std::uint64_t{1} << column % 64;
      ++starts[row + 1];
    });
  });
  for (std::size_t r = 0; r < w.rows; ++r) starts[r + 1] += starts[r];
  with_bits(item_size(slots.dtype()), [&](auto width) {
    using Value = decltype(width);
    each_group([&](std::size_t g) {
      Value* next[kMaxSlotRows] = {};
      for (std::size_t slot = 0; slot < w.depth; ++slot)
        if (reader.row(g, slot) != kSlotBlock)
          next[slot] = writer.section<Value>(2) + starts[reader.first_row(g) + reader.row(g, slot)];
      reader.for_each(g, [&](std::size_t slot, std::size_t, std::size_t value) {
        *next[slot]++ = static_cast<const Value*>(w.values)[value];
      });
    });
  });
  return writer.finish();
}

std::string fault_of(const SlotView& w, const FormHeader& header) {
  const std::size_t groups = slot_groups(w.rows, w.depth);
  if (w.groups[0].step != 0 || w.groups[0].value != 0 || w.groups[groups].step != header.steps ||
      w.groups[groups].value != header.units)
    return "expected groups from the first step to the last";
  for (std::size_t g = 0; g < groups; ++g)
    if (w.groups[g].step > w.groups[g + 1].step || w.groups[g].value > w.groups[g + 1].value)
      return "expected groups in order";
  std::string fault = fault_of_order(w);
  std::uint64_t nnz = 0;
  for (std::size_t g = 0; g < groups && fault.empty(); ++g) fault = fault_of_group(w, g, &nnz);
  if (fault.empty() && nnz != header.nnz) fault = "expected as many entries as its header says";
  if (!fault.empty() || !w.full) return fault;
  with_bits(item_size(static_cast<DType>(header.dtype)), [&](auto width) {
    const SlotReader reader{w};
    const auto* value = static_cast<const decltype(width)*>(w.values);
    for (std::size_t step = 0; step < header.steps; ++step)
      for (std::size_t slot = 0; slot < w.depth; ++slot, ++value)
        if (*value != 0 && (reader.used(step) >> slot & 1) == 0)
          fault = "a slot that is not used has a value";
  });
  return fault;
}

}  // namespace sparsam
