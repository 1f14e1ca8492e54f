// Common parts of the code that builds forms.
#pragma once
#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "chunks.hpp"
#include "int8.hpp"
#include "matmul.hpp"
#include "sparsam/forms.hpp"
#include "sparsam/masks.hpp"
#include "sparsam/memory.hpp"

namespace sparsam {

constexpr std::size_t offset_bytes(std::size_t depth) { return depth < 256 ? 1 : 2; }
constexpr std::size_t panel_depth_blocks(std::size_t cols, std::size_t depth) {
  return cols == 0 ? 1 : (cols + depth - 1) / depth;
}
constexpr std::size_t panel_blocks(std::size_t rows, std::size_t cols, std::size_t depth) {
  return (rows + kRowBlock - 1) / kRowBlock * panel_depth_blocks(cols, depth);
}

constexpr std::size_t slot_groups(std::size_t rows, std::size_t depth) { return (rows + depth - 1) / depth; }

FormPtr bitmask_of_panels(const Form& panels);
FormPtr bitmask_of_slots(const Form& slots);
FormPtr bitmask_of_int8_rows(const Form& rows);

// Of the rows form of int8 values.
struct Int8RowsView {
  std::size_t rows, cols;
  const std::int8_t* values;  // rows * cols, zeros too
  const float* scales;        // one a row
};
void unpack_rows(const Form& rows, float* to);

// A header with its sections laid out: kind, dtype, shared_rows and the counts are given.
FormHeader laid_out(FormHeader counts);
FormHeader header_for(FormKind kind, DType dtype, std::size_t rows, std::size_t cols, std::size_t nnz);

// A form in new memory that is being written.
class FormWriter {
 public:
  explicit FormWriter(const FormHeader& counts);

  const FormHeader& header() const { return header_; }
  FormHeader& header() { return *memory_->as<FormHeader>(); }
  template <class T>
  T* section(std::size_t i) const {
    return reinterpret_cast<T*>(memory_->as<char>() + header_.sections[i]);
  }
  FormPtr finish() const;

 private:
  FormHeader header_;
  std::shared_ptr<Memory> memory_;
};

// Ranges of rows, distributed over threads.
struct RowTasks {
  std::size_t rows, step, tasks, workers;

  RowTasks(std::size_t n_rows, std::size_t cols)
      : rows(n_rows),
        step(std::max<std::size_t>(1, (std::size_t{1} << 16) / std::max<std::size_t>(cols, 1))),
        tasks((rows + step - 1) / step),
        workers(worker_count(tasks, rows * cols >= kSerialBelow)) {}

  template <class Body>
  void run(Body&& body) const {  // body(worker, row)
    for_each_task(tasks, workers, [&](std::size_t worker, std::size_t task) {
      for (std::size_t r = task * step; r < std::min(rows, (task + 1) * step); ++r) body(worker, r);
    });
  }
};

// The columns of the bits that are set in words [begin, end), in turn, as visit(column).
template <class Visit>
void for_each_bit(const std::uint64_t* words, std::size_t begin, std::size_t end, Visit&& visit) {
  for (std::size_t k = begin; k < end; ++k)
    for (std::uint64_t bits = words[k]; bits != 0; bits &= bits - 1)
      visit(k * 64 + static_cast<std::size_t>(__builtin_ctzll(bits)));
}

inline std::size_t count_words(const std::uint64_t* words, std::size_t n) {
  std::size_t count = 0;
  for (std::size_t k = 0; k < n; ++k) count += static_cast<std::size_t>(__builtin_popcountll(words[k]));
  return count;
}

// Whether every aligned four rows of a bitmask share their columns.
bool rows_share(const std::uint64_t* words, std::size_t rows, std::size_t cols);

// What is wrong with the content of a form whose header is valid; empty if nothing is.
std::string fault_of(const BitmaskView& w, const FormHeader& header);
std::string fault_of(const PanelView& w, const FormHeader& header);
std::string fault_of(const SlotView& w, const FormHeader& header);  // but for shared_rows
std::string fault_of(const Int8RowsView& w, const FormHeader& header);
std::string fault_of(const Int8View& w, const FormHeader& header, const Form& form);
std::string fault_of(const Int4BitmaskView& w, const FormHeader& header, const Form& form);
std::string fault_of(const Int4View& w, const FormHeader& header, const Form& form);

// int8 values: slots of a given geometry, and back; what is wrong with values and scales.
FormPtr int8_slots_of(const Form& bitmask, std::size_t lanes, std::size_t window);
FormPtr bitmask_of_int8_slots(const Form& slots);
FormPtr int8_bitmask(const std::uint64_t* words, std::size_t rows, std::size_t cols,
                     const std::int8_t* values, const float* scales, Taps taps);
std::string fault_of_int8(const std::int8_t* values, std::size_t nnz, const float* scales, std::size_t rows);
inline bool is_int8_value(int q) { return q != 0 && q >= -kInt8Most && q <= kInt8Most; }
// Rows in the order of their lanes, `rows` where there is none. Sorted by length in stretches where that
// saves more than results cost that leave one by one.
std::vector<std::uint32_t> lane_rows(const BitmaskView& w, std::size_t lanes);
// The entries of rows, in any order, as the words and values of a bitmask.
struct SlotEntry {
  std::uint16_t column;
  std::int8_t value;
};
struct RowBits {
  Memory words;
  std::vector<std::int8_t> values;
};
RowBits row_bits(std::vector<std::vector<SlotEntry>> rows, std::size_t cols);
inline bool is_scale(float s) { return s >= 0x1p-126f && s <= 0x1.fffffep127f; }

constexpr std::size_t int4_units(std::size_t cols, std::size_t width) { return (cols + width - 1) / width; }
// int4 values row by row: what their forms are made of, and what these give back.
struct Int4Weights {
  std::size_t rows, cols, width;
  RowBits bits;
  std::vector<std::uint64_t> row_start;
  std::vector<std::uint16_t> scales;  // rows * units()
  std::array<std::int8_t, kInt4Levels> levels;

  // Counts the words. Throws std::invalid_argument where something is wrong with values, scales or levels.
  Int4Weights(std::size_t n_rows, std::size_t n_cols, std::size_t group, RowBits rows_bits,
              std::vector<std::uint16_t> unit_scales, const std::int8_t* all_levels);

  std::size_t units() const { return int4_units(cols, width); }
  std::size_t nnz() const { return bits.values.size(); }
  BitmaskView view() const {
    return {
        rows, cols, words_for(cols), bits.words.as<std::uint64_t>(), row_start.data(), bits.values.data()};
  }
  float scale(std::size_t row, std::size_t unit) const;
  float zero(std::size_t row) const;           // the row's scaled sum where all bytes of x are 128
  FormHeader header_for(FormKind kind) const;  // without counts that are a form's own
  void codes(std::uint8_t* to) const;          // ceil(nnz / 2) bytes, as on disk
};
Int4Weights int4_weights_of(const Form& form);
Int4Weights weights_of_int4_slots(const Form& slots);
Int4Weights weights_of_int4_bitmask(const Form& bitmask);
FormPtr int4_bitmask_of(const Int4Weights& w);
FormPtr int4_slots_of(const Int4Weights& w, std::size_t lanes);
// What is wrong with values, scales and levels.
std::string fault_of_int4(const std::int8_t* values, std::size_t nnz, const std::uint16_t* scales,
                          std::size_t n_scales, const std::int8_t* levels);
// Code of each level, as a byte; 0 for what is none.
struct Int4Codes {
  std::uint8_t of[256] = {};
  explicit Int4Codes(const std::int8_t* levels) {
    for (std::size_t i = 1; i < kInt4Levels; ++i)
      of[static_cast<std::uint8_t>(levels[i])] = static_cast<std::uint8_t>(i);
  }
};

}  // namespace sparsam
