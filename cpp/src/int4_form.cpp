// The slots form of int4 values: built from rows, turned back into them, and checked.
#include <memory>
#include <stdexcept>
#include <vector>

#include "forms.hpp"
#include "int8.hpp"
#include "slot_rows.hpp"
#include "slot_steps.hpp"
#include "sparsam/dtypes.hpp"
#include "sparsam/errors.hpp"
#include "sparsam/isa.hpp"
#include "sparsam/masks.hpp"
#include "table.hpp"

namespace sparsam {
namespace {

constexpr std::size_t kSlots = 4;  // of a row, a step

// The entries of the rows of a group, of which steps take one after the other.
struct LaneEntries {
  std::vector<std::uint32_t> columns;
  std::vector<std::uint8_t> codes;
  std::size_t next = 0;
};

// Builds the slots of one group of rows, unit by unit.
class Int4Group {
 public:
  Int4Group(const BitmaskView& w, std::size_t lanes, std::size_t width, const Int4Codes& codes,
            const std::uint32_t* rows)
      : w_(w), lanes_(lanes), width_(width), lane_(lanes) {
    for (std::size_t i = 0; i < lanes; ++i) {
      if (rows[i] >= w.rows) continue;
      const auto* value = static_cast<const std::int8_t*>(w.values) + w.row_start[rows[i]];
      for_each_bit(w.words + rows[i] * w.row_words, 0, w.row_words, [&](std::size_t c) {
        lane_[i].columns.push_back(static_cast<std::uint32_t>(c));
        lane_[i].codes.push_back(codes.of[static_cast<std::uint8_t>(*value++)]);
      });
    }
  }

  // Windows that slide over the columns of each unit.
  void slide() {
    for (std::size_t from = 0; from < w_.cols; from += width_) {
      const std::size_t end = std::min(w_.cols, from + width_);
      std::vector<SlotRow> rows(lanes_);
      std::vector<std::vector<std::uint32_t>> columns(lanes_);
      for (std::size_t i = 0; i < lanes_; ++i) {
        const LaneEntries& lane = lane_[i];
        for (std::size_t k = lane.next; k < lane.columns.size() && lane.columns[k] < end; ++k)
          columns[i].push_back(lane.columns[k] - static_cast<std::uint32_t>(from));
        rows[i] = {columns[i].data(), columns[i].data() + columns[i].size()};
      }
      const SlotShape shape{lanes_, kSlots, kInt4Window, 0};
      for_each_step(shape, rows.data(), lanes_, end - from,
                    [&](std::size_t start, const std::uint8_t* taken) {
                      add_step(from, start, [&](std::size_t i) { return taken[i]; });
                    });
      end_unit();
    }
  }

  // `steps` for each aligned window, whatever it holds.
  void step_regularly(std::size_t steps) {
    for (std::size_t from = 0; from < w_.cols; from += width_) {
      for (std::size_t window = 0; window < width_ && from + window < w_.cols; window += kInt4Window)
        for (std::size_t step = 0; step < steps; ++step)
          add_step(from, window, [&](std::size_t i) {
            const LaneEntries& lane = lane_[i];
            std::size_t count = 0;
            while (count < kSlots && lane.next + count < lane.columns.size() &&
                   lane.columns[lane.next + count] < from + window + kInt4Window)
              ++count;
            return count;
          });
      end_unit();
    }
  }

  std::vector<std::uint32_t> pairs;  // of each unit
  std::vector<std::uint8_t> starts, codes;

 private:
  template <class Count>
  void add_step(std::size_t from, std::size_t start, Count&& count) {
    const bool second = starts.size() % 2 != 0;
    if (!second) codes.resize(codes.size() + int4_pair_bytes(lanes_));
    std::uint8_t* const code = codes.data() + codes.size() - int4_pair_bytes(lanes_);
    starts.push_back(static_cast<std::uint8_t>(start));
    const int shift = second ? 4 : 0;
    for (std::size_t i = 0; i < lanes_; ++i) {
      LaneEntries& lane = lane_[i];
      const std::size_t n = count(i);
      for (std::size_t slot = kSlots * i; slot < kSlots * i + n; ++slot, ++lane.next) {
        const std::size_t offset = lane.columns[lane.next] - from - start;
        code[slot] |= static_cast<std::uint8_t>(lane.codes[lane.next] << shift);
        code[kSlots * lanes_ + slot] |= static_cast<std::uint8_t>(offset << shift);
      }
    }
  }

  void end_unit() {
    if (starts.size() % 2 != 0) starts.push_back(starts.back());  // its slots are not used
    pairs.push_back(static_cast<std::uint32_t>(starts.size() / 2 - ended_));
    ended_ = starts.size() / 2;
  }

  const BitmaskView& w_;
  std::size_t lanes_, width_, ended_ = 0;
  std::vector<LaneEntries> lane_;
};

// The most entries that any row has in 16 aligned columns.
std::size_t most_in_a_window(const BitmaskView& w) {
  std::size_t most = 0;
  for (std::size_t i = 0; i < w.rows * w.row_words; ++i)
    for (std::size_t shift = 0; shift < 64; shift += kInt4Window)
      most = std::max(most, static_cast<std::size_t>(__builtin_popcountll(w.words[i] >> shift & 0xffff)));
  return most;
}

struct Built {
  std::vector<std::uint32_t> order;
  std::vector<Int4Group> groups;
  std::size_t per_window = 0, pairs = 0, bytes = 0;
};

Built build(const Int4Weights& weights, std::size_t lanes, std::size_t per_window) {
  const BitmaskView w = weights.view();
  const std::size_t width = weights.width;
  const Int4Codes codes(weights.levels.data());
  Built built;
  built.per_window = per_window;
  built.order.resize((w.rows + lanes - 1) / lanes * lanes, static_cast<std::uint32_t>(w.rows));
  if (per_window == 0) {
    built.order = lane_rows(w, lanes);
  } else {
    for (std::size_t r = 0; r < w.rows; ++r) built.order[r] = static_cast<std::uint32_t>(r);
  }
  const std::size_t n = built.order.size() / lanes;
  std::vector<std::unique_ptr<Int4Group>> groups(n);
  for_each_task(n, worker_count(n, w.rows * w.cols >= kSerialBelow), [&](std::size_t, std::size_t g) {
    groups[g] = std::make_unique<Int4Group>(w, lanes, width, codes, built.order.data() + g * lanes);
    if (per_window == 0)
      groups[g]->slide();
    else
      groups[g]->step_regularly(per_window);
  });
  for (auto& group : groups) {
    built.pairs += group->starts.size() / 2;
    built.groups.push_back(std::move(*group));
  }
  built.bytes = built.pairs * int4_pair_bytes(lanes);
  if (per_window == 0) built.bytes += 2 * built.pairs + sizeof(std::uint32_t) * n * int4_units(w.cols, width);
  return built;
}

// Steps that stand in the same places in all units cost nothing to find; windows that slide use more slots.
Built built_best(const Int4Weights& w, std::size_t lanes) {
  const std::size_t per_window = (most_in_a_window(w.view()) + kSlots - 1) / kSlots;
  const std::size_t slots = w.rows * ((w.cols + kInt4Window - 1) / kInt4Window) * per_window * kSlots;
  if (per_window == 0) return build(w, lanes, 0);
  Built regular;
  if (10 * w.nnz() >= 4 * slots) regular = build(w, lanes, per_window);
  if (100 * w.nnz() >= 97 * slots) return regular;
  Built sliding = build(w, lanes, 0);
  return regular.per_window != 0 && regular.bytes <= sliding.bytes ? std::move(regular) : std::move(sliding);
}

std::size_t lanes_of(const Int4View& w) { return (w.rows + w.lanes - 1) / w.lanes * w.lanes; }

// visit(lane, column, code) of each slot, used or not, while it returns true; whether it did.
template <class Visit>
bool for_each_slot(const Int4View& w, Visit&& visit) {
  const std::size_t slots = kSlots * w.lanes;
  for (std::size_t g = 0; g < lanes_of(w) / w.lanes; ++g)
    for (std::size_t unit = 0; unit < w.units(); ++unit) {
      const std::size_t first = w.first_pair(g, unit), last = w.first_pair(g, unit + 1);
      for (std::size_t pair = first; pair < last; ++pair) {
        const std::uint8_t* const code = w.codes + int4_pair_bytes(w.lanes) * pair;
        for (std::size_t i = 0; i < 2 * slots; ++i) {
          const std::size_t step = i / slots, slot = i % slots;
          const std::size_t start = unit * w.width + w.starts_of(first)[2 * (pair - first) + step];
          if (!visit(g * w.lanes + slot / kSlots, start + (code[slots + slot] >> 4 * step & 15),
                     static_cast<std::uint8_t>(code[slot] >> 4 * step & 15)))
            return false;
        }
      }
    }
  return true;
}

}  // namespace

FormPtr int4_slots_of(const Int4Weights& w, std::size_t lanes) {
  const std::size_t width = w.width, units = w.units();
  const Built built = built_best(w, lanes);
  FormHeader counts = w.header_for(FormKind::slots);
  counts.depth = built.per_window;
  counts.units = lanes;
  counts.steps = built.pairs;
  if (counts.steps > UINT32_MAX)
    throw std::invalid_argument(
        expected("int4 values", counts.steps, "at most 2^32 pairs of steps", "split the matrix"));
  const FormWriter writer(counts);
  const bool regular = built.per_window != 0;
  auto* begin = writer.section<std::uint32_t>(0);
  auto* row = writer.section<std::uint32_t>(1);
  auto* zero = reinterpret_cast<float*>(row + built.order.size());
  auto* scale = writer.section<std::uint16_t>(2);
  auto* start = writer.section<std::uint8_t>(3);
  auto* code = writer.section<std::uint8_t>(4);
  std::copy(built.order.begin(), built.order.end(), row);
  std::copy(w.levels.begin(), w.levels.end(), writer.section<std::int8_t>(5));
  if (!regular) *begin = 0;
  for (std::size_t g = 0; g < built.groups.size(); ++g) {
    const Int4Group& group = built.groups[g];
    for (std::size_t unit = 0; unit < units; ++unit, scale += lanes) {
      if (!regular) begin[1] = begin[0] + group.pairs[unit], ++begin;
      for (std::size_t i = 0; i < lanes; ++i) {
        const std::size_t r = built.order[g * lanes + i];
        scale[i] = r < w.rows ? w.scales[r * units + unit] : 0;
      }
    }
    code = std::copy(group.codes.begin(), group.codes.end(), code);
    if (!regular) start = std::copy(group.starts.begin(), group.starts.end(), start);
  }
  if (regular)
    for (std::size_t step = 0; step < width / kInt4Window * built.per_window; ++step)
      start[step] = static_cast<std::uint8_t>(step / built.per_window * kInt4Window);
  for (std::size_t lane = 0; lane < built.order.size(); ++lane)
    zero[lane] = built.order[lane] < w.rows ? w.zero(built.order[lane]) : 0.0f;
  return writer.finish();
}

FormPtr int4_slots_of(const Form& other) {
  return int4_slots_of(int4_weights_of(other), int4_kernels().int4_lanes);
}

Int4Weights weights_of_int4_slots(const Form& form) {
  const Int4View w = form.int4_slots();
  const std::size_t units = w.units();
  std::vector<std::vector<SlotEntry>> entries(w.rows);
  for_each_slot(w, [&](std::size_t lane, std::size_t column, std::uint8_t code) {
    if (code != 0) entries[w.row[lane]].push_back({static_cast<std::uint16_t>(column), w.levels[code]});
    return true;
  });
  std::vector<std::uint16_t> scales(w.rows * units);
  for (std::size_t lane = 0; lane < lanes_of(w); ++lane)
    for (std::size_t unit = 0; unit < units && w.row[lane] < w.rows; ++unit)
      scales[w.row[lane] * units + unit] =
          w.scale[(lane / w.lanes * units + unit) * w.lanes + lane % w.lanes];
  return Int4Weights(w.rows, w.cols, w.width, row_bits(std::move(entries), w.cols), std::move(scales),
                     w.levels);
}

// First that it can be read at all; then it is right if the packer makes the same of what it holds.
std::string fault_of(const Int4View& w, const FormHeader& header, const Form& form) {
  const std::size_t groups = lanes_of(w) / w.lanes, units = w.units();
  if (w.per_window == 0) {
    if (w.begin[0] != 0 || w.begin[groups * units] != header.steps)
      return "expected as many steps as its header says";
    for (std::size_t unit = 0; unit < groups * units; ++unit)
      if (w.begin[unit] > w.begin[unit + 1] || w.begin[unit + 1] > header.steps)
        return "expected units in order";
  } else if (header.steps != groups * w.pairs_of(w.cols)) {
    return "expected as many steps as its header says";
  }
  if (!fault_of_int4(nullptr, 0, nullptr, 0, w.levels).empty()) return "expected levels that rise";
  const std::string rows = fault_of_rows(w, lanes_of(w), [&](std::size_t lane) {
    for (std::size_t unit = 0; unit < units; ++unit) {
      const std::uint16_t* const scale = w.scale + (lane / w.lanes * units + unit) * w.lanes + lane % w.lanes;
      if (!fault_of_int4(nullptr, 0, scale, 1, w.levels).empty()) return false;
    }
    return true;
  });
  if (!rows.empty()) return rows;
  const bool readable = for_each_slot(w, [&](std::size_t lane, std::size_t column, std::uint8_t code) {
    return code == 0 || (column < w.cols && w.row[lane] < w.rows);
  });
  if (!readable) return "expected weights in rows and columns that it has";
  const FormPtr again = int4_slots_of(weights_of_int4_slots(form), w.lanes);
  if (again->bytes() != form.bytes() || std::memcmp(again->data(), form.data(), form.bytes()) != 0)
    return "expected the slots that its weights are given";
  return {};
}

}  // namespace sparsam
