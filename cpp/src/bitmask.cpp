// The bitmask form: built from arrays, from the form on disk and from panels, and checked.
#include <atomic>
#include <stdexcept>

#include "forms.hpp"
#include "sparsam/dtypes.hpp"
#include "sparsam/errors.hpp"
#include "sparsam/isa.hpp"
#include "sparsam/masks.hpp"
#include "table.hpp"

namespace sparsam {
namespace {

using Words = std::uint64_t*;

// A writer whose words are complete, with row_start computed from them.
FormWriter begin(const std::uint64_t* words, std::size_t rows, std::size_t cols, DType dtype,
                 std::size_t width = 0) {
  const std::size_t row_words = words_for(cols);
  const Memory row_start(8 * (rows + 1));
  auto* const starts = row_start.as<std::uint64_t>();
  const RowTasks all(rows, cols);
  all.run([&](std::size_t, std::size_t r) { starts[r + 1] = count_words(words + r * row_words, row_words); });
  starts[0] = 0;
  for (std::size_t r = 0; r < rows; ++r) starts[r + 1] += starts[r];
  FormHeader counts = header_for(FormKind::bitmask, dtype, rows, cols, starts[rows]);
  counts.shared_rows = rows_share(words, rows, cols) ? 4 : 0;
  counts.width = width;
  FormWriter writer(counts);
  std::copy_n(starts, rows + 1, writer.section<std::uint64_t>(1));
  all.run([&](std::size_t, std::size_t r) {
    std::copy_n(words + r * row_words, row_words, writer.section<std::uint64_t>(0) + r * row_words);
  });
  return writer;
}

// Words of `cols` bits that begin at bit `start` of a mask.
void copy_bits(const std::uint64_t* mask, std::size_t start, std::size_t cols, Words to) {
  const std::size_t shift = start % 64, n = words_for(cols), last = (start + cols - 1) / 64;
  for (std::size_t k = 0, from = start / 64; k < n; ++k, ++from) {
    to[k] = mask[from] >> shift;
    if (shift != 0 && from < last) to[k] |= mask[from + 1] << (64 - shift);
  }
  if (cols % 64 != 0) to[n - 1] &= (std::uint64_t{1} << cols % 64) - 1;
}

// mark(bits, row, words) sets the bits of a row with these elements.
template <class Mark>
FormPtr pack_rows(const View& w, std::size_t rows, std::size_t cols, bool read_to_mark, Mark&& mark) {
  const std::size_t row_words = words_for(cols);
  const Memory words(8 * rows * row_words);
  return with_bits(item_size(w.dtype()), [&](auto width) {
    using Bits = decltype(width);
    const RowTasks all(rows, cols);
    const Buffers<Bits> buffers(all.workers, cols, !w.contiguous());
    if (cols > 0)
      all.run([&](std::size_t worker, std::size_t r) {
        const Bits* const src = read_to_mark ? w.read(r * cols, cols, buffers.of(worker)) : nullptr;
        mark(src, r, words.as<std::uint64_t>() + r * row_words);
      });
    const FormWriter writer = begin(words.as<std::uint64_t>(), rows, cols, w.dtype());
    const auto* const starts = writer.section<std::uint64_t>(1);
    all.run([&](std::size_t worker, std::size_t r) {
      if (starts[r] == starts[r + 1]) return;
      const Bits* const src = w.read(r * cols, cols, buffers.of(worker));
      Bits* to = writer.section<Bits>(2) + starts[r];
      for_each_bit(words.as<std::uint64_t>() + r * row_words, 0, row_words,
                   [&](std::size_t c) { *to++ = src[c]; });
    });
    return writer.finish();
  });
}

// Of the form on disk.
Memory words_of(std::size_t rows, std::size_t cols, const std::uint8_t* bits) {
  const std::size_t row_words = words_for(cols), row_bytes = (cols + 7) / 8;
  Memory memory(8 * rows * row_words);
  Words words = memory.as<std::uint64_t>();
  for (std::size_t r = 0; r < rows && row_bytes > 0; ++r, words += row_words) {
    words[row_words - 1] = 0;
    std::memcpy(words, bits + r * row_bytes, row_bytes);
    if (cols % 64 != 0 && words[row_words - 1] >> cols % 64 != 0)
      throw std::invalid_argument(expected("bits of row " + std::to_string(r), "others",
                                           "0 past the last column", "repair the mask"));
  }
  return memory;
}

void check_count(std::size_t values, std::size_t bits) {
  if (values != bits)
    throw std::invalid_argument(expected(
        "values", values, std::to_string(bits) + ", one for each bit that is set", "pass those of the mask"));
}

// Words and values of a matrix of integers.
RowBits row_bits(const std::int8_t* w, std::size_t rows, std::size_t cols) {
  const std::size_t row_words = words_for(cols);
  RowBits bits{Memory(8 * rows * row_words), {}};
  std::fill_n(bits.words.as<std::uint64_t>(), rows * row_words, 0);
  RowTasks(rows, cols).run([&](std::size_t, std::size_t r) {
    std::uint64_t* const to = bits.words.as<std::uint64_t>() + r * row_words;
    for (std::size_t c = 0; c < cols; ++c) to[c / 64] |= std::uint64_t{w[r * cols + c] != 0} << c % 64;
  });
  for (std::size_t i = 0; i < rows * cols; ++i)
    if (w[i] != 0) bits.values.push_back(w[i]);
  return bits;
}

// Of numbers that are bfloat16.
std::vector<std::uint16_t> upper_halves(const float* from, std::size_t n) {
  std::vector<std::uint16_t> halves(n);
  for (std::size_t i = 0; i < n; ++i) {
    const auto bits = bit_cast<std::uint32_t>(from[i]);
    if ((bits & 0xffff) != 0)
      throw std::invalid_argument(
          expected("scales", std::to_string(from[i]), "numbers that bfloat16 holds", "round them"));
    halves[i] = static_cast<std::uint16_t>(bits >> 16);
  }
  return halves;
}

}  // namespace

bool rows_share(const std::uint64_t* words, std::size_t rows, std::size_t cols) {
  if (rows == 0 || rows % 4 != 0) return false;
  const std::size_t row_words = words_for(cols);
  std::atomic<bool> same{true};
  RowTasks(rows, cols).run([&](std::size_t, std::size_t r) {
    const std::uint64_t* const row = words + r * row_words;
    if (r % 4 == 0 || !same.load(std::memory_order_relaxed)) return;
    if (!std::equal(row, row + row_words, row - row_words)) same.store(false, std::memory_order_relaxed);
  });
  return same.load();
}

FormPtr pack_bitmask(const View& w, std::size_t rows, std::size_t cols) {
  return pack_rows(w, rows, cols, true, [&](const auto* src, std::size_t, Words words) {
    using Bits = std::remove_const_t<std::remove_pointer_t<decltype(src)>>;
    width_kernels<Bits>(kernels()).threshold_mask(src, cols, 0, 0, words, static_cast<Bits*>(nullptr));
  });
}

FormPtr pack_bitmask(const View& w, std::size_t rows, std::size_t cols, const std::uint64_t* mask) {
  return pack_rows(w, rows, cols, false,
                   [&](const auto*, std::size_t r, Words words) { copy_bits(mask, r * cols, cols, words); });
}

FormPtr pack_bitmask(std::size_t rows, std::size_t cols, const std::uint8_t* bits, const View& values) {
  const Memory memory = words_of(rows, cols, bits);
  const FormWriter writer = begin(memory.as<std::uint64_t>(), rows, cols, values.dtype());
  const std::size_t nnz = writer.header().nnz;
  check_count(values.size(), nnz);
  with_bits(item_size(values.dtype()), [&](auto width) {
    using Bits = decltype(width);
    Bits* const own = writer.section<Bits>(2);
    const Bits* const from = values.read(0, nnz, own);
    if (from != own && nnz > 0) std::memcpy(own, from, nnz * sizeof(Bits));
  });
  return writer.finish();
}

FormPtr int8_bitmask(const std::uint64_t* words, std::size_t rows, std::size_t cols,
                     const std::int8_t* values, const float* scales, Taps taps) {
  const FormWriter writer = begin(words, rows, cols, DType::i8, taps.bits());
  if (const std::string fault = fault_of_int8(values, writer.header().nnz, scales, rows); !fault.empty())
    throw std::invalid_argument(fault);
  std::copy_n(values, writer.header().nnz, writer.section<std::int8_t>(2));
  std::copy_n(scales, rows, writer.section<float>(3));
  return writer.finish();
}

FormPtr pack_int8(const std::int8_t* w, std::size_t rows, std::size_t cols, const float* scales, Taps taps) {
  const RowBits bits = row_bits(w, rows, cols);
  return int8_bitmask(bits.words.as<std::uint64_t>(), rows, cols, bits.values.data(), scales, taps);
}

FormPtr pack_int8(std::size_t rows, std::size_t cols, const std::uint8_t* bits, const std::int8_t* values,
                  std::size_t n_values, const float* scales, Taps taps) {
  const Memory words = words_of(rows, cols, bits);
  const std::size_t nnz = count_words(words.as<std::uint64_t>(), rows * words_for(cols));
  check_count(n_values, nnz);
  return int8_bitmask(words.as<std::uint64_t>(), rows, cols, values, scales, taps);
}

FormPtr pack_int4(const std::int8_t* w, std::size_t rows, std::size_t cols, std::size_t width,
                  const float* scales, const std::int8_t* levels) {
  return int4_bitmask_of(Int4Weights(rows, cols, width, row_bits(w, rows, cols),
                                     upper_halves(scales, rows * int4_units(cols, width)), levels));
}

FormPtr pack_int4(std::size_t rows, std::size_t cols, std::size_t width, const std::uint8_t* bits,
                  const std::uint8_t* codes, std::size_t n_bytes, const float* scales,
                  const std::int8_t* levels) {
  Memory words = words_of(rows, cols, bits);
  const std::size_t nnz = count_words(words.as<std::uint64_t>(), rows * words_for(cols));
  if (n_bytes != (nnz + 1) / 2)
    throw std::invalid_argument(expected(
        "values", n_bytes, std::to_string((nnz + 1) / 2) + " bytes, half of one for each bit that is set",
        "pass those of the mask"));
  if (nnz % 2 != 0 && codes[nnz / 2] >> 4 != 0)
    throw std::invalid_argument(
        expected("values", "another half byte", "0 past the last value", "repair the values"));
  std::vector<std::int8_t> values(nnz);
  for (std::size_t i = 0; i < nnz; ++i) values[i] = levels[codes[i / 2] >> 4 * (i % 2) & 15];
  return int4_bitmask_of(Int4Weights(rows, cols, width, {std::move(words), std::move(values)},
                                     upper_halves(scales, rows * int4_units(cols, width)), levels));
}

std::string fault_of_int8(const std::int8_t* values, std::size_t nnz, const float* scales, std::size_t rows) {
  for (std::size_t i = 0; i < nnz; ++i)
    if (!is_int8_value(values[i]))
      return expected("values", static_cast<int>(values[i]), "-64 to 64 and not 0",
                      "quantise the weight again");
  for (std::size_t r = 0; r < rows; ++r)
    if (!is_scale(scales[r]))
      return expected("scales", std::to_string(scales[r]) + " for row " + std::to_string(r),
                      "positive, normal numbers", "quantise the weight again");
  return {};
}

std::string fault_of(const BitmaskView& w, const FormHeader& header) {
  const std::uint64_t past = w.cols % 64 == 0 ? 0 : ~std::uint64_t{0} << w.cols % 64;
  if (w.row_start[0] != 0) return "expected the first row to start at value 0";
  for (std::size_t r = 0; r < w.rows; ++r) {
    const std::uint64_t* const words = w.words + r * w.row_words;
    if (w.row_words > 0 && (words[w.row_words - 1] & past) != 0)
      return "row " + std::to_string(r) + ": expected no bits past the last column";
    if (w.row_start[r + 1] - w.row_start[r] != count_words(words, w.row_words))
      return "row " + std::to_string(r) + ": expected as many values as bits";
  }
  if (w.row_start[w.rows] != header.nnz) return "expected as many values as its header says";
  if (rows_share(w.words, w.rows, w.cols) != (header.shared_rows != 0))
    return "expected rows to share columns where its header says so, and only there";
  return {};
}

}  // namespace sparsam
