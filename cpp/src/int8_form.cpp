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
    starts.clear();
    codes.clear();
    while (first_column() < w_.cols) add_pair();
  }

  std::vector<std::uint16_t> starts;
  std::vector<std::uint8_t> codes;

 private:
  std::size_t first_column() const {
    std::size_t first = w_.cols;
    for (std::size_t i = 0; i < lanes_; ++i)
      if (next_[i] < entries_[i].size()) first = std::min<std::size_t>(first, entries_[i][next_[i]].column);
    return first;
  }

  void add_pair() {
    const std::size_t at = codes.size(), slots = 4 * lanes_;
    codes.resize(at + int8_pair_bytes(lanes_, window_));
    const std::size_t steps = int8_pair_starts(window_);
    for (std::size_t step = 0; step < steps; ++step) {
      const std::size_t start = std::min(first_column(), w_.cols - 1);
      starts.push_back(static_cast<std::uint16_t>(start));
      for (std::size_t i = 0; i < lanes_; ++i) {
        std::size_t& next = next_[i];
        for (std::size_t slot = 4 * i; slot < 4 * i + 4 && next < entries_[i].size(); ++slot, ++next) {
          const SlotEntry& entry = entries_[i][next];
          if (entry.column >= start + window_) break;
          const std::size_t offset = entry.column - start;
          std::uint8_t* const code = codes.data() + at;
          code[step * slots + slot] = static_cast<std::uint8_t>(entry.value);
          code[steps * slots + slot] |= static_cast<std::uint8_t>(offset << 4 * step);
        }
      }
    }
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
  std::vector<std::vector<std::uint16_t>> group_starts(groups);
  std::vector<std::vector<std::uint8_t>> group_codes(groups);
  for_each_task(groups, worker_count(groups, w.rows * w.cols >= kSerialBelow),
                [&](std::size_t, std::size_t g) {
                  SlotGroup group(w, bitmask.taps(), lanes, window);
                  group.fill(order.data() + g * lanes);
                  group_starts[g] = std::move(group.starts);
                  group_codes[g] = std::move(group.codes);
                });
  FormHeader counts = header_for(FormKind::slots, DType::i8, w.rows, w.cols, bitmask.nnz());
  counts.shared_rows = bitmask.header().shared_rows;
  counts.width = bitmask.header().width;
  counts.depth = window;
  counts.units = lanes;
  for (const auto& codes : group_codes) counts.steps += codes.size() / bytes;
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
  *begin = 0;
  for (std::size_t g = 0; g < groups; ++g) {
    std::copy(group_starts[g].begin(), group_starts[g].end(),
              writer.section<std::uint16_t>(2) + starts * *begin);
    std::copy(group_codes[g].begin(), group_codes[g].end(), writer.section<std::uint8_t>(3) + bytes * *begin);
    begin[1] = begin[0] + group_codes[g].size() / bytes;
    ++begin;
  }
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
    if (w.begin[g] > w.begin[g + 1] || w.begin[g + 1] > header.steps) return "expected groups in order";
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
