// The rows form of int8 values: all of a weight, zeros too, and a scale for each row. Rows are looked up in
// it.
#include <stdexcept>
#include <vector>

#include "forms.hpp"
#include "sparsam/errors.hpp"
#include "sparsam/masks.hpp"

namespace sparsam {
namespace {

void widen(const Int8RowsView& w, std::size_t r, float* to) {
  const std::int8_t* const from = w.values + r * w.cols;
  const float scale = w.scales[r];
  for (std::size_t c = 0; c < w.cols; ++c) to[c] = scale * static_cast<float>(from[c]);
}

}  // namespace

FormPtr int8_rows_of(const Form& bitmask) {
  const BitmaskView w = bitmask.bitmask();
  FormHeader counts = header_for(FormKind::rows, DType::i8, w.rows, w.cols, bitmask.nnz());
  counts.shared_rows = bitmask.header().shared_rows;
  counts.width = bitmask.header().width;
  const FormWriter writer(counts);
  auto* const values = writer.section<std::int8_t>(0);
  std::fill_n(values, w.rows * w.cols, std::int8_t{0});
  RowTasks(w.rows, w.cols).run([&](std::size_t, std::size_t r) {
    const auto* from = static_cast<const std::int8_t*>(w.values) + w.row_start[r];
    for_each_bit(w.words + r * w.row_words, 0, w.row_words,
                 [&](std::size_t c) { values[r * w.cols + c] = *from++; });
  });
  std::copy_n(bitmask.scales(), w.rows, writer.section<float>(1));
  return writer.finish();
}

FormPtr bitmask_of_int8_rows(const Form& rows) {
  const Int8RowsView w = rows.int8_rows();
  return pack_int8(w.values, w.rows, w.cols, w.scales, rows.taps());
}

std::string fault_of(const Int8RowsView& w, const FormHeader& header) {
  std::size_t nnz = 0;
  for (std::size_t i = 0; i < w.rows * w.cols; ++i) {
    if (w.values[i] != 0 && !is_int8_value(w.values[i])) return "expected weights from -64 to 64";
    nnz += w.values[i] != 0;
  }
  if (nnz != header.nnz) return "expected as many weights as its header says";
  for (std::size_t r = 0; r < w.rows; ++r)
    if (!is_scale(w.scales[r])) return "expected scales that are positive, normal numbers";
  const FormPtr bitmask = pack_int8(w.values, w.rows, w.cols, w.scales);
  if (bitmask->header().shared_rows != header.shared_rows)
    return "expected rows to share columns where its header says so, and only there";
  return {};
}

void look_up(const Form& form, const std::int64_t* ids, std::size_t n, float* to) {
  const Int8RowsView w = form.int8_rows();
  for (std::size_t i = 0; i < n; ++i)
    if (ids[i] < 0 || static_cast<std::size_t>(ids[i]) >= w.rows)
      throw std::out_of_range(expected("indices", ids[i],
                                       "numbers of rows, 0 to " + std::to_string(w.rows - 1),
                                       "pass those of rows that the weight has"));
  RowTasks(n, w.cols).run(
      [&](std::size_t, std::size_t i) { widen(w, static_cast<std::size_t>(ids[i]), to + i * w.cols); });
}

void unpack_rows(const Form& form, float* to) {
  const Int8RowsView w = form.int8_rows();
  RowTasks(w.rows, w.cols).run([&](std::size_t, std::size_t r) { widen(w, r, to + r * w.cols); });
}

}  // namespace sparsam
