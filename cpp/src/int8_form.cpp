// The slots form of int8 values: built from a bitmask, turned back into one, and checked.
#include <numeric>
#include <stdexcept>
#include <vector>

#include "forms.hpp"
#include "int8.hpp"
#include "slot_rows.hpp"
#include "sparsam/errors.hpp"
#include "sparsam/isa.hpp"
#include "sparsam/masks.hpp"
#include "table.hpp"

namespace sparsam {
namespace {

void sort_by_column(std::vector<SlotEntry>& row) {
  std::sort(row.begin(), row.end(),
            [](const SlotEntry& a, const SlotEntry& b) { return a.column < b.column; });
}

// Weights of one row in the two steps of a pair, with windows of 16: which slot each has.
class PairSlots {
 public:
  std::size_t count[2] = {0, 0};
  int value[2][4];
  std::uint8_t slot[2][4];  // of the four that a step gives a row

  // Deals the weights of each step to the first and the last two slots, so that the sums over both steps fit
  // 16 bits; whether they can. The first step begins with its first slot and the second with its third.
  bool narrow() {
    for (unsigned a = 0; a < 1u << count[0]; ++a)
      for (unsigned b = 0; deal(0, a) && b < 1u << count[1]; ++b)
        if (deal(1, ~b) && fits(a, ~b)) return true;
    deal(0, count[0] > 2 ? 12 : 0);
    deal(1, count[1] > 2 ? 3 : 15);
    return false;
  }

 private:
  // Bit i of `last`: weight i has one of the last two slots.
  bool deal(std::size_t step, unsigned last) {
    std::uint8_t next[2] = {0, 2};
    for (std::size_t i = 0; i < count[step]; ++i) slot[step][i] = next[last >> i & 1]++;
    return next[0] <= 2 && next[1] <= 4;
  }

  bool fits(unsigned a, unsigned b) const {
    int above[2] = {0, 0}, below[2] = {0, 0};
    for (std::size_t step = 0; step < 2; ++step)
      for (std::size_t i = 0; i < count[step]; ++i) {
        const std::size_t half = (step == 0 ? a : b) >> i & 1;
        above[half] += std::max(value[step][i], 0);
        below[half] += std::min(value[step][i], 0);
      }
    return std::max(above[0], above[1]) <= kInt8Narrow && std::min(below[0], below[1]) >= -kInt8Narrow;
  }
};

// One group of rows while its weights are given slots: windows slide, each from the first column that some
// row still needs, and every row takes as many of its next weights as there are slots.
class SlotGroup {
 public:
  SlotGroup(const BitmaskView& w, Taps taps, std::size_t lanes, std::size_t window)
      : w_(w), taps_(taps), lanes_(lanes), window_(window), entries_(lanes), next_(lanes) {}

  void fill(const std::uint32_t* rows) {
    for (std::size_t i = 0; i < lanes_; ++i) {
      entries_[i].clear();
      next_[i] = 0;
      if (rows[i] >= w_.rows) continue;
      const auto* value = static_cast<const std::int8_t*>(w_.values) + w_.row_start[rows[i]];
      for_each_bit(w_.words + rows[i] * w_.row_words, 0, w_.row_words, [&](std::size_t c) {
        entries_[i].push_back({static_cast<std::uint16_t>(taps_.place(c, w_.cols)), *value++});
      });
      if (taps_.count() != 0) sort_by_column(entries_[i]);
    }
    narrow = wide = {};
    while (first_column() < w_.cols) add_pair();
  }

  struct Pairs {
    std::vector<std::uint16_t> starts;
    std::vector<std::uint8_t> codes;
  };
  Pairs narrow, wide;  // with windows of 64 all are wide

 private:
  std::size_t first_column() const {
    std::size_t first = w_.cols;
    for (std::size_t i = 0; i < lanes_; ++i)
      if (next_[i] < entries_[i].size()) first = std::min<std::size_t>(first, entries_[i][next_[i]].column);
    return first;
  }

  void add_pair() {
    const std::size_t slots = 4 * lanes_, steps = int8_pair_starts(window_);
    std::vector<PairSlots> dealt(lanes_);
    std::vector<std::uint8_t> codes(int8_pair_bytes(lanes_, window_));
    std::uint16_t starts[2];
    std::vector<std::size_t> first = next_;
    for (std::size_t step = 0; step < steps; ++step) {
      starts[step] = static_cast<std::uint16_t>(std::min(first_column(), w_.cols - 1));
      for (std::size_t i = 0; i < lanes_; ++i) {
        std::size_t& n = dealt[i].count[step];
        for (; n < 4 && next_[i] < entries_[i].size(); ++next_[i]) {
          const SlotEntry& entry = entries_[i][next_[i]];
          if (entry.column >= starts[step] + window_) break;
          dealt[i].value[step][n++] = entry.value;
        }
      }
    }
    bool fits = steps == 2;
    if (fits)
      for (PairSlots& row : dealt) fits = row.narrow() && fits;
    for (std::size_t i = 0; i < lanes_; ++i)
      for (std::size_t step = 0; step < steps; ++step)
        for (std::size_t n = 0; n < dealt[i].count[step]; ++n) {
          const SlotEntry& entry = entries_[i][first[i]++];
          const std::size_t slot = 4 * i + (steps == 2 ? dealt[i].slot[step][n] : n);
          codes[step * slots + slot] = static_cast<std::uint8_t>(entry.value);
          codes[steps * slots + slot] |= static_cast<std::uint8_t>((entry.column - starts[step]) << 4 * step);
        }
    Pairs& to = fits ? narrow : wide;
    to.starts.insert(to.starts.end(), starts, starts + steps);
    to.codes.insert(to.codes.end(), codes.begin(), codes.end());
  }

  const BitmaskView& w_;
  Taps taps_;
  std::size_t lanes_, window_;
  std::vector<std::vector<SlotEntry>> entries_;
  std::vector<std::size_t> next_;
};

std::size_t lanes_of(const Int8View& w) { return (w.rows + w.lanes - 1) / w.lanes * w.lanes; }

// visit(lane, column, value as a byte) of each slot, used or not, while it returns true; whether it did.
template <class Visit>
bool for_each_slot(const Int8View& w, Visit&& visit) {
  const std::size_t slots = 4 * w.lanes, starts = int8_pair_starts(w.window);
  for (std::size_t g = 0; g < lanes_of(w) / w.lanes; ++g)
    for (std::uint64_t pair = w.begin[g]; pair < w.begin[g + 1]; ++pair) {
      const std::uint8_t* const code = w.codes + int8_pair_bytes(w.lanes, w.window) * pair;
      for (std::size_t i = 0; i < starts * slots; ++i) {
        const std::size_t step = i / slots, slot = i % slots;
        const std::uint8_t place = code[starts * slots + slot];
        const std::size_t offset = w.window == 16 ? place >> 4 * step & 15 : place;
        if (!visit(g * w.lanes + slot / 4, w.start[starts * pair + step] + offset, code[i])) return false;
      }
    }
  return true;
}

}  // namespace

std::vector<std::uint32_t> lane_rows(const BitmaskView& w, std::size_t lanes) {
  std::vector<std::uint32_t> order((w.rows + lanes - 1) / lanes * lanes, static_cast<std::uint32_t>(w.rows));
  std::iota(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(w.rows), 0u);
  std::vector<std::uint32_t> sorted = order;
  const auto entries = [&](std::uint32_t r) { return r < w.rows ? w.row_start[r + 1] - w.row_start[r] : 0; };
  for (std::size_t from = 0; from < sorted.size(); from += kRowBlock)
    std::stable_sort(sorted.begin() + static_cast<std::ptrdiff_t>(from),
                     sorted.begin() + static_cast<std::ptrdiff_t>(std::min(sorted.size(), from + kRowBlock)),
                     [&](std::uint32_t a, std::uint32_t b) { return entries(a) > entries(b); });
  const auto longest = [&](const std::vector<std::uint32_t>& rows) {
    std::uint64_t sum = 0;
    for (std::size_t from = 0; from < rows.size(); from += lanes) {
      std::uint64_t most = 0;
      for (std::size_t i = 0; i < lanes; ++i) most = std::max(most, entries(rows[from + i]));
      sum += most;
    }
    return sum;
  };
  return 2 * longest(order) > 3 * longest(sorted) ? sorted : order;
}

RowBits row_bits(std::vector<std::vector<SlotEntry>> rows, std::size_t cols) {
  const std::size_t row_words = words_for(cols);
  RowBits bits{Memory(8 * rows.size() * row_words), {}};
  auto* to = bits.words.as<std::uint64_t>();
  std::fill_n(to, rows.size() * row_words, 0);
  for (std::vector<SlotEntry>& row : rows) {
    sort_by_column(row);
    for (const SlotEntry& entry : row) {
      const std::uint64_t bit = std::uint64_t{1} << entry.column % 64;
      if ((to[entry.column / 64] & bit) == 0) bits.values.push_back(entry.value);  // twice only where damaged
      to[entry.column / 64] |= bit;
    }
    to += row_words;
  }
  return bits;
}

FormPtr int8_slots_of(const Form& bitmask, std::size_t lanes, std::size_t window) {
  const BitmaskView w = bitmask.bitmask();
  const float* const scales = bitmask.scales();
  if (w.cols > kInt8Columns)
    throw std::invalid_argument(expected(
        "int8 values", w.cols, "at most " + std::to_string(kInt8Columns) + " columns", "use float values"));
  const std::vector<std::uint32_t> order = lane_rows(w, lanes);
  const std::size_t groups = order.size() / lanes, bytes = int8_pair_bytes(lanes, window);
  const std::size_t starts = int8_pair_starts(window);
  std::vector<SlotGroup::Pairs> narrow(groups), wide(groups);
  for_each_task(groups, worker_count(groups, w.rows * w.cols >= kSerialBelow),
                [&](std::size_t, std::size_t g) {
                  SlotGroup group(w, bitmask.taps(), lanes, window);
                  group.fill(order.data() + g * lanes);
                  narrow[g] = std::move(group.narrow);
                  wide[g] = std::move(group.wide);
                });
  FormHeader counts = header_for(FormKind::slots, DType::i8, w.rows, w.cols, bitmask.nnz());
  counts.shared_rows = bitmask.header().shared_rows;
  counts.width = bitmask.header().width;
  counts.depth = window;
  counts.units = lanes;
  for (std::size_t g = 0; g < groups; ++g)
    counts.steps += (narrow[g].codes.size() + wide[g].codes.size()) / bytes;
  const FormWriter writer(counts);
  auto* begin = writer.section<std::uint64_t>(0);
  auto* row = writer.section<std::uint32_t>(1);
  auto* first = reinterpret_cast<std::int32_t*>(row + order.size());
  auto* scale = reinterpret_cast<float*>(first + order.size());
  std::copy(order.begin(), order.end(), row);
  for (std::size_t i = 0; i < order.size(); ++i) {
    const bool none = order[i] >= w.rows;
    const auto* const values = static_cast<const std::int8_t*>(w.values);
    first[i] = none ? 0
                    : -kInt8Zero * std::accumulate(values + w.row_start[order[i]],
                                                   values + w.row_start[order[i] + 1], 0);
    scale[i] = none ? 0.0f : scales[order[i]];
  }
  std::size_t pair = 0;
  const auto add = [&](const SlotGroup::Pairs& pairs) {
    std::copy(pairs.starts.begin(), pairs.starts.end(), writer.section<std::uint16_t>(2) + starts * pair);
    std::copy(pairs.codes.begin(), pairs.codes.end(), writer.section<std::uint8_t>(3) + bytes * pair);
    pair += pairs.codes.size() / bytes;
  };
  for (std::size_t g = 0; g < groups; ++g) {
    begin[g] = pair;
    add(narrow[g]);
    if (starts == 2) begin[groups + 1 + g] = pair;
    add(wide[g]);
  }
  begin[groups] = pair;
  return writer.finish();
}

FormPtr int8_slots_of(const Form& bitmask) {
  const Int8Kernels& row = int8_kernels();
  return int8_slots_of(bitmask, row.lanes, row.window);
}

FormPtr bitmask_of_int8_slots(const Form& form) {
  const Int8View w = form.int8_slots();
  std::vector<std::vector<SlotEntry>> entries(w.rows);
  std::vector<float> scales(w.rows);
  const Taps taps = form.taps();
  for_each_slot(w, [&](std::size_t lane, std::size_t column, std::uint8_t code) {
    if (code != 0)
      entries[w.row[lane]].push_back(
          {static_cast<std::uint16_t>(taps.column(column, w.cols)), static_cast<std::int8_t>(code)});
    return true;
  });
  for (std::size_t lane = 0; lane < lanes_of(w); ++lane)
    if (w.row[lane] < w.rows) scales[w.row[lane]] = w.scale[lane];
  const RowBits bits = row_bits(std::move(entries), w.cols);
  return int8_bitmask(bits.words.as<std::uint64_t>(), w.rows, w.cols, bits.values.data(), scales.data(),
                      taps);
}

// First that it can be read at all; then it is right if the packer makes the same of what it holds.
std::string fault_of(const Int8View& w, const FormHeader& header, const Form& form) {
  const std::size_t groups = lanes_of(w) / w.lanes;
  if (w.begin[0] != 0 || w.begin[groups] != header.steps) return "expected as many steps as its header says";
  for (std::size_t g = 0; g < groups; ++g)
    if (w.begin[g] > w.begin[g + 1] || w.begin[g + 1] > header.steps ||
        (w.wide != nullptr && (w.wide[g] < w.begin[g] || w.wide[g] > w.begin[g + 1])))
      return "expected groups in order";
  const std::string rows =
      fault_of_rows(w, lanes_of(w), [&](std::size_t lane) { return is_scale(w.scale[lane]); });
  if (!rows.empty()) return rows;
  const std::size_t starts = int8_pair_starts(w.window) * header.steps;
  for (std::size_t i = 0; i < starts; ++i)
    if (w.start[i] >= w.cols) return "expected columns that the weight has";
  const bool readable = for_each_slot(w, [&](std::size_t lane, std::size_t column, std::uint8_t code) {
    return code == 0 ||
           (is_int8_value(static_cast<std::int8_t>(code)) && column < w.cols && w.row[lane] < w.rows);
  });
  if (!readable) return "expected weights from -64 to 64, in rows and columns that it has";
  const FormPtr again = int8_slots_of(*bitmask_of_int8_slots(form), w.lanes, w.window);
  if (again->bytes() != form.bytes() || std::memcmp(again->data(), form.data(), form.bytes()) != 0)
    return "expected the slots that its weights are given";
  return {};
}

}  // namespace sparsam
