// int4 values row by row, and their bitmask form: built from rows, turned back into them, and checked.
#include <stdexcept>
#include <vector>

#include "forms.hpp"
#include "int8.hpp"
#include "sparsam/dtypes.hpp"
#include "sparsam/errors.hpp"
#include "sparsam/masks.hpp"

namespace sparsam {
namespace {

constexpr std::size_t kHalf = kInt4Rows / 2;  // rows of a word

// visit(row of the group, column) of the bits of one word of a step, in order.
template <class Visit>
void for_each_weight(std::uint64_t word, std::size_t step, std::size_t half, Visit&& visit) {
  for (; word != 0; word &= word - 1) {
    const auto bit = static_cast<std::size_t>(__builtin_ctzll(word));
    visit(half * kHalf + bit / kInt4Step, step * kInt4Step + bit % kInt4Step);
  }
}

// Where the codes of each group begin: both halves of its bytes are used from there on.
std::vector<std::uint64_t> begin_of(const Int4Weights& w, std::size_t groups) {
  std::vector<std::uint64_t> begin(groups + 1);
  for (std::size_t g = 0; g < groups; ++g) {
    const auto start = [&](std::size_t half) {
      return w.row_start[std::min(w.rows, g * kInt4Rows + half * kHalf)];
    };
    begin[g + 1] = begin[g] + std::max(start(1) - start(0), start(2) - start(1));
  }
  return begin;
}

}  // namespace

Int4Weights::Int4Weights(std::size_t n_rows, std::size_t n_cols, std::size_t group, RowBits rows_bits,
                         std::vector<std::uint16_t> unit_scales, const std::int8_t* all_levels)
    : rows(n_rows),
      cols(n_cols),
      width(group),
      bits(std::move(rows_bits)),
      row_start(n_rows + 1),
      scales(std::move(unit_scales)) {
  const std::string fault =
      fault_of_int4(bits.values.data(), bits.values.size(), scales.data(), scales.size(), all_levels);
  if (!fault.empty()) throw std::invalid_argument(fault);
  std::copy_n(all_levels, kInt4Levels, levels.begin());
  const std::size_t words = words_for(cols);
  for (std::size_t r = 0; r < rows; ++r)
    row_start[r + 1] = row_start[r] + count_words(bits.words.as<std::uint64_t>() + r * words, words);
}

float Int4Weights::scale(std::size_t row, std::size_t unit) const {
  return bfloat_to_float(scales[row * units() + unit]);
}

float Int4Weights::zero(std::size_t row) const {
  const BitmaskView w = view();
  const std::int8_t* value = bits.values.data() + row_start[row];
  std::vector<std::int32_t> sums(units());
  for_each_bit(w.words + row * w.row_words, 0, w.row_words,
               [&](std::size_t c) { sums[c / width] += kInt8Zero * *value++; });
  float total = 0;
  for (std::size_t unit = 0; unit < sums.size(); ++unit)  // as kernels do it
    total += static_cast<float>(sums[unit]) * scale(row, unit);
  return total;
}

FormHeader Int4Weights::header_for(FormKind kind) const {
  FormHeader header = sparsam::header_for(kind, DType::i4, rows, cols, nnz());
  header.shared_rows = rows_share(bits.words.as<std::uint64_t>(), rows, cols) ? 4 : 0;
  header.width = width;
  return header;
}

void Int4Weights::codes(std::uint8_t* to) const {
  const Int4Codes codes(levels.data());
  std::fill_n(to, (nnz() + 1) / 2, std::uint8_t{0});
  for (std::size_t i = 0; i < nnz(); ++i)
    to[i / 2] |=
        static_cast<std::uint8_t>(codes.of[static_cast<std::uint8_t>(bits.values[i])] << 4 * (i % 2));
}

Int4Weights int4_weights_of(const Form& form) {
  return form.kind() == FormKind::slots ? weights_of_int4_slots(form) : weights_of_int4_bitmask(form);
}

FormPtr int4_bitmask_of(const Int4Weights& weights) {
  const BitmaskView w = weights.view();
  FormHeader counts = weights.header_for(FormKind::bitmask);
  const std::size_t groups = (w.rows + kInt4Rows - 1) / kInt4Rows, units = weights.units();
  const std::size_t steps = (w.cols + kInt4Step - 1) / kInt4Step;
  const std::vector<std::uint64_t> begin = begin_of(weights, groups);
  counts.steps = begin[groups];
  const FormWriter writer(counts);
  std::copy(begin.begin(), begin.end(), writer.section<std::uint64_t>(0));
  std::copy(weights.levels.begin(), weights.levels.end(), writer.section<std::int8_t>(5));
  const Int4Codes codes(weights.levels.data());
  for_each_task(
      groups, worker_count(groups, w.rows * w.cols >= kSerialBelow), [&](std::size_t, std::size_t g) {
        float* const zero = writer.section<float>(1) + g * kInt4Rows;
        std::uint16_t* const scale = writer.section<std::uint16_t>(2) + g * units * kInt4Rows;
        std::uint64_t* const words = writer.section<std::uint64_t>(3) + 2 * g * steps;
        const std::int8_t* next[kInt4Rows] = {};  // value of each row
        std::fill_n(words, 2 * steps, std::uint64_t{0});
        for (std::size_t i = 0; i < kInt4Rows; ++i) {
          const std::size_t r = g * kInt4Rows + i;
          zero[i] = r < w.rows ? weights.zero(r) : 0.0f;
          for (std::size_t unit = 0; unit < units; ++unit)
            scale[unit * kInt4Rows + i] = r < w.rows ? weights.scales[r * units + unit] : std::uint16_t{0};
          if (r >= w.rows) continue;
          next[i] = weights.bits.values.data() + w.row_start[r];
          for_each_bit(w.words + r * w.row_words, 0, w.row_words, [&](std::size_t c) {
            words[2 * (c / kInt4Step) + i / kHalf] |= std::uint64_t{1}
                                                      << (i % kHalf * kInt4Step + c % kInt4Step);
          });
        }
        std::uint8_t* const to = writer.section<std::uint8_t>(4) + begin[g];
        std::fill_n(to, begin[g + 1] - begin[g], std::uint8_t{0});
        for (std::size_t half = 0; half < 2; ++half) {
          std::uint8_t* code = to;
          for (std::size_t step = 0; step < steps; ++step)
            for_each_weight(words[2 * step + half], step, half, [&](std::size_t i, std::size_t) {
              *code++ |=
                  static_cast<std::uint8_t>(codes.of[static_cast<std::uint8_t>(*next[i]++)] << 4 * half);
            });
        }
      });
  return writer.finish();
}

Int4Weights weights_of_int4_bitmask(const Form& form) {
  const Int4BitmaskView w = form.int4_bitmask();
  const std::size_t row_words = words_for(w.cols), steps = w.steps(), units = w.units();
  Memory memory(8 * w.rows * row_words);
  auto* const words = memory.as<std::uint64_t>();
  std::fill_n(words, w.rows * row_words, std::uint64_t{0});
  const auto for_each = [&](std::size_t half, std::size_t g, auto&& visit) {
    for (std::size_t step = 0; step < steps; ++step)
      for_each_weight(w.words[2 * (g * steps + step) + half], step, half,
                      [&](std::size_t i, std::size_t c) { visit(g * kInt4Rows + i, c); });
  };
  for (std::size_t i = 0; i < 2 * w.groups(); ++i)
    for_each(i % 2, i / 2, [&](std::size_t r, std::size_t c) {
      words[r * row_words + c / 64] |= std::uint64_t{1} << c % 64;
    });
  std::vector<std::size_t> next(w.rows);  // value of each row
  std::size_t nnz = 0;
  for (std::size_t r = 0; r < w.rows; ++r) {
    next[r] = nnz;
    nnz += count_words(words + r * row_words, row_words);
  }
  std::vector<std::int8_t> values(nnz);
  for (std::size_t i = 0; i < 2 * w.groups(); ++i) {
    const std::uint8_t* code = w.codes + w.begin[i / 2];
    for_each(i % 2, i / 2,
             [&](std::size_t r, std::size_t) { values[next[r]++] = w.levels[*code++ >> 4 * (i % 2) & 15]; });
  }
  std::vector<std::uint16_t> scales(w.rows * units);
  for (std::size_t r = 0; r < w.rows; ++r)
    for (std::size_t unit = 0; unit < units; ++unit)
      scales[r * units + unit] = w.scale[(r / kInt4Rows * units + unit) * kInt4Rows + r % kInt4Rows];
  return Int4Weights(w.rows, w.cols, w.width, {std::move(memory), std::move(values)}, std::move(scales),
                     w.levels);
}

std::string fault_of_int4(const std::int8_t* values, std::size_t nnz, const std::uint16_t* scales,
                          std::size_t n_scales, const std::int8_t* levels) {
  bool rising = levels[0] == 0 && levels[1] != 0 && levels[1] >= -kInt8Most && levels[15] <= kInt8Most;
  for (std::size_t i = 2; i < kInt4Levels; ++i)
    rising = rising && levels[i] > levels[i - 1] && levels[i] != 0;
  if (!rising)
    return expected("levels", "others", "0, then 15 that rise from -64 to 64, none of them 0",
                    "quantise the weight again");
  const Int4Codes codes(levels);
  for (std::size_t i = 0; i < nnz; ++i)
    if (codes.of[static_cast<std::uint8_t>(values[i])] == 0)
      return expected("values", static_cast<int>(values[i]), "levels but 0", "quantise the weight again");
  for (std::size_t i = 0; i < n_scales; ++i) {
    const float scale = bfloat_to_float(scales[i]);
    if (!is_scale(scale) || scale > kInt4Largest)
      return expected("scales", std::to_string(scale), "positive, normal numbers up to 2^96",
                      "quantise the weight again");
  }
  return {};
}

// First that it can be read at all; then it is right if the packer makes the same of what it holds.
std::string fault_of(const Int4BitmaskView& w, const FormHeader& header, const Form& form) {
  const std::size_t groups = w.groups(), steps = w.steps();
  if (w.begin[0] != 0 || w.begin[groups] != header.steps) return "expected as many codes as its header says";
  for (std::size_t g = 0; g < groups; ++g) {
    if (w.begin[g] > w.begin[g + 1] || w.begin[g + 1] > header.steps) return "expected groups in order";
    std::size_t counts[2] = {};
    bool inside = true;
    for (std::size_t step = 0; step < steps; ++step)
      for (std::size_t half = 0; half < 2; ++half)
        for_each_weight(w.words[2 * (g * steps + step) + half], step, half,
                        [&](std::size_t i, std::size_t c) {
                          inside = inside && g * kInt4Rows + i < w.rows && c < w.cols;
                          ++counts[half];
                        });
    if (!inside) return "expected weights in rows and columns that it has";
    if (w.begin[g + 1] - w.begin[g] != std::max(counts[0], counts[1])) return "expected a code for each bit";
  }
  if (std::string fault = fault_of_int4(nullptr, 0, nullptr, 0, w.levels); !fault.empty()) return fault;
  try {
    const FormPtr again = int4_bitmask_of(weights_of_int4_bitmask(form));
    if (again->bytes() == form.bytes() && std::memcmp(again->data(), form.data(), form.bytes()) == 0)
      return {};
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "expected the bitmask that its weights are given";
}

}  // namespace sparsam
