#include "forms.hpp"

#include <iterator>
#include <stdexcept>

#include "sparsam/errors.hpp"
#include "sparsam/masks.hpp"

namespace sparsam {
namespace {

constexpr std::size_t kLargest = std::size_t{1} << 40;  // of a side, and of both multiplied

std::size_t aligned(std::size_t n) {
  return (n + FormHeader::kAlign - 1) / FormHeader::kAlign * FormHeader::kAlign;
}

template <class Got>
[[noreturn]] void refuse(const Got& got, const std::string& wanted) {
  throw std::invalid_argument(expected("buffer", got, wanted, "pack the weight again"));
}

// Of a buffer of that many bytes. Checks all that the sizes of sections are computed from, then these.
void check_header(const FormHeader& h, std::size_t bytes) {
  if (std::memcmp(h.magic, FormHeader::kMagic, sizeof h.magic) != 0)
    refuse("another beginning", "a form of a packed weight, which begins with 'sparsam'");
  if (h.version != FormHeader::kVersion) refuse(h.version, "version " + std::to_string(FormHeader::kVersion));
  const bool panels = h.kind == FormKind::panels, slots = h.kind == FormKind::slots;
  const bool int4 = h.dtype == static_cast<std::uint8_t>(DType::i4);
  const bool int8 = int4 || h.dtype == static_cast<std::uint8_t>(DType::i8);
  if (!panels && !slots && h.kind != FormKind::bitmask && h.kind != FormKind::rows)
    refuse(static_cast<int>(h.kind), "form 1 (bitmask), 2 (panels), 3 (slots) or 4 (rows)");
  if (h.dtype > static_cast<std::uint8_t>(DType::f32) && !int8)
    refuse(h.dtype, "values of dtype 0, 1, 2, 4 or 5");
  if (int8 && panels) refuse("panels of integers", "panels of float values");
  if ((!int8 || int4) && h.kind == FormKind::rows) refuse("rows of other values", "rows of int8 values");
  if (int4 && h.width != 64 && h.width != 128) refuse(h.width, "64 or 128 columns that share a scale");
  if (int8 && !int4 && h.width != 0 &&
      (h.width != Taps::of(h.width).bits() || !Taps::of(h.width).fits(h.cols)))
    refuse(h.width, "0, or the kernel of a convolution of so many columns");
  if (h.shared_rows != 0 && (h.shared_rows != 4 || h.rows == 0 || h.rows % 4 != 0))
    refuse(h.shared_rows, "0, or 4 for rows in fours, as the number of rows that share columns");
  if (h.rows > kLargest || h.cols > kLargest || (h.cols > 0 && h.rows > kLargest / h.cols) ||
      h.nnz > h.rows * h.cols)
    refuse(std::to_string(h.rows) + " x " + std::to_string(h.cols) + " with " + std::to_string(h.nnz),
           "at most 2^40 weights, and no more nonzero ones");
  if (slots && int4 && !((h.units == 8 || h.units == 16) && h.depth <= 4 && h.steps <= UINT32_MAX))
    refuse(std::to_string(h.units) + " with " + std::to_string(h.depth),
           "8 or 16 rows with 0 to 4 steps a window");
  if (slots && int8 && !int4 && !((h.depth == 16 && h.units == 8) || (h.depth == 64 && h.units == 32)))
    refuse(std::to_string(h.units) + " with " + std::to_string(h.depth),
           "8 rows with windows of 16, or 32 with windows of 64");
  if ((int4 || (slots && int8)) && (h.cols > kInt8Columns || h.rows >= UINT32_MAX))
    refuse(std::to_string(h.cols) + " and " + std::to_string(h.rows),
           "at most " + std::to_string(kInt8Columns) + " columns and 2^32 rows");
  const bool depth_fits = panels   ? h.depth > 0 && h.depth <= kMaxDepth && h.depth % 64 == 0
                          : !slots ? h.depth == 0
                          : int8   ? true
                                   : h.depth == 8 || h.depth == 16;
  if (!depth_fits || h.units > bytes || h.steps > bytes ||
      (!panels && !slots && (h.units != 0 || (h.steps != 0 && !int4))) ||
      (slots && !int8 && h.units != h.nnz && h.units != h.steps * h.depth))
    refuse("depth " + std::to_string(h.depth), "a depth of 64 to " + std::to_string(kMaxDepth) +
                                                   " (slots: 8 or 16), and units and steps that fit in it");
  const FormHeader own = laid_out(h);
  if (std::memcmp(&own, &h, sizeof h) != 0 || own.bytes != bytes)
    refuse(bytes, std::to_string(own.bytes) + " bytes, with the sections that its counts demand");
}

// Whether two bitmasks of one size and dtype say the same.
bool same(const Form& first, const Form& again) {
  if (first.dtype() == DType::i4)  // byte by byte, as checked forms have them
    return again.bytes() == first.bytes() && std::memcmp(again.data(), first.data(), first.bytes()) == 0;
  const BitmaskView a = first.bitmask(), b = again.bitmask();
  const std::uint64_t scales = first.header().sections[3];
  return std::memcmp(a.words, b.words, 8 * a.rows * a.row_words) == 0 &&
         std::memcmp(a.values, b.values, again.nnz() * item_size(again.dtype())) == 0 &&
         std::memcmp(first.data() + scales, again.data() + again.header().sections[3],
                     first.bytes() - scales) == 0;
}

// Bits of rows, each of which begins with a byte.
void copy_rows(const BitmaskView& w, std::uint8_t* to) {
  const std::size_t row_bytes = (w.cols + 7) / 8;
  for (std::size_t r = 0; r < w.rows && row_bytes > 0; ++r)
    std::memcpy(to + r * row_bytes, w.words + r * w.row_words, row_bytes);
}

// Weights of a bitmask of integers: each times scale(row, column).
template <class Scale>
void unpack_scaled(const BitmaskView& w, float* to, Scale&& scale) {
  RowTasks(w.rows, w.cols).run([&](std::size_t, std::size_t r) {
    float* const row = to + r * w.cols;
    const auto* from = static_cast<const std::int8_t*>(w.values) + w.row_start[r];
    std::fill(row, row + w.cols, 0.0f);
    for_each_bit(w.words + r * w.row_words, 0, w.row_words,
                 [&](std::size_t c) { row[c] = scale(r, c) * static_cast<float>(*from++); });
  });
}

}  // namespace

FormHeader laid_out(FormHeader h) {
  const std::size_t item = item_size(static_cast<DType>(h.dtype));
  constexpr std::size_t kMaxSections = std::size(FormHeader{}.sections);
  std::size_t sizes[kMaxSections] = {8 * h.rows * words_for(h.cols), 8 * (h.rows + 1), h.nnz * item};
  const bool int4 = h.dtype == static_cast<std::uint8_t>(DType::i4);
  const bool int8 = h.dtype == static_cast<std::uint8_t>(DType::i8);
  const bool bitmask = h.kind == FormKind::bitmask, slots = h.kind == FormKind::slots;
  const bool rows = h.kind == FormKind::rows;
  const std::size_t n = rows ? 2 : int4 ? 6 : bitmask ? (int8 ? 4 : 3) : slots && !int8 ? 6 : 4;
  if (int8) sizes[3] = 4 * h.rows;
  if (bitmask && int4) {
    const Int4BitmaskView w{h.rows, h.cols, h.width, {}, {}, {}, {}, {}, {}};
    sizes[0] = sizeof(std::uint64_t) * (w.groups() + 1);
    sizes[1] = sizeof(float) * w.groups() * kInt4Rows;
    sizes[2] = sizeof(std::uint16_t) * w.groups() * w.units() * kInt4Rows;
    sizes[3] = 2 * sizeof(std::uint64_t) * w.groups() * w.steps();
    sizes[4] = h.steps;
    sizes[5] = kInt4Levels;
  }
  if (rows) {
    sizes[0] = h.rows * h.cols;
    sizes[1] = 4 * h.rows;
    sizes[2] = sizes[3] = 0;
  } else if (slots && int4) {
    const std::size_t groups = (h.rows + h.units - 1) / h.units, units = int4_units(h.cols, h.width);
    const bool regular = h.depth != 0;
    sizes[0] = regular ? 0 : sizeof(std::uint32_t) * (groups * units + 1);
    sizes[1] = (sizeof(std::uint32_t) + sizeof(float)) * groups * h.units;
    sizes[2] = sizeof(std::uint16_t) * groups * units * h.units;
    sizes[3] = regular ? h.width / kInt4Window * h.depth : 2 * h.steps;
    sizes[4] = int4_pair_bytes(h.units) * h.steps;
    sizes[5] = kInt4Levels;
  } else if (slots && int8) {
    const std::size_t groups = (h.rows + h.units - 1) / h.units;
    sizes[0] = 8 * (groups + 1 + (h.depth == 16 ? groups : 0));
    sizes[1] = 12 * groups * h.units;
    sizes[2] = 2 * int8_pair_starts(h.depth) * h.steps;
    sizes[3] = int8_pair_bytes(h.units, h.depth) * h.steps;
  } else if (slots) {
    const std::size_t groups = slot_groups(h.rows, h.depth);
    sizes[0] = (groups + 1) * sizeof(SlotStart);
    sizes[1] = groups * h.depth;
    sizes[2] = h.steps * (h.depth == 8 ? sizeof(std::uint32_t) : sizeof(std::uint64_t));
    sizes[3] = h.depth == 8 ? 0 : h.steps * sizeof(std::uint16_t);
    sizes[4] = h.steps;
    sizes[5] = h.units * item;
  } else if (h.kind == FormKind::panels) {
    sizes[0] = (panel_blocks(h.rows, h.cols, h.depth) + 1) * sizeof(PanelBlock);
    sizes[1] = h.units * kUnitHeader * sizeof(std::uint16_t);
    sizes[2] = h.steps * (h.shared_rows != 0 ? 1 : 4) * offset_bytes(h.depth);
    sizes[3] = 4 * h.steps * item;
  }
  std::size_t at = sizeof(FormHeader);
  for (std::size_t i = 0; i < kMaxSections; ++i) {
    h.sections[i] = i < n ? at : 0;
    at += aligned(sizes[i]);
  }
  h.bytes = at + FormHeader::kReadable;
  h.zero = 0;
  if (!int4 && !int8) h.width = 0;
  return h;
}

FormHeader header_for(FormKind kind, DType dtype, std::size_t rows, std::size_t cols, std::size_t nnz) {
  FormHeader h{};
  std::memcpy(h.magic, FormHeader::kMagic, sizeof h.magic);
  h.version = FormHeader::kVersion;
  h.kind = kind;
  h.dtype = static_cast<std::uint8_t>(dtype);
  h.rows = rows;
  h.cols = cols;
  h.nnz = nnz;
  return h;
}

FormWriter::FormWriter(const FormHeader& counts)
    : header_(laid_out(counts)), memory_(std::make_shared<Memory>(header_.bytes)) {
  // Before each section, and at the end, for the gaps that the alignment leaves.
  for (const std::uint64_t start : header_.sections)
    if (start != 0) std::memset(memory_->as<char>() + start - FormHeader::kAlign, 0, FormHeader::kAlign);
  const std::size_t last = FormHeader::kAlign + FormHeader::kReadable;
  std::memset(memory_->as<char>() + header_.bytes - last, 0, last);
  std::memcpy(memory_->as<char>(), &header_, sizeof header_);
}

FormPtr FormWriter::finish() const {
  const char* const data = memory_->as<char>();
  return FormPtr(new Form(data, memory_));
}

FormPtr Form::adopt(const void* data, std::size_t bytes, std::shared_ptr<const void> owner, bool trusted) {
  if (reinterpret_cast<std::uintptr_t>(data) % 8 != 0)
    throw std::invalid_argument(
        expected("buffer", "another one", "an address that is a multiple of 8", "copy it"));
  if (bytes < sizeof(FormHeader)) refuse(bytes, "at least " + std::to_string(sizeof(FormHeader)) + " bytes");
  FormPtr form(new Form(static_cast<const char*>(data), std::move(owner)));
  const FormHeader& header = form->header();
  check_header(header, bytes);
  if (trusted) return form;
  const bool int8 = form->dtype() == DType::i8, int4 = form->dtype() == DType::i4;
  std::string fault;
  if (header.kind == FormKind::bitmask && int4) {
    fault = fault_of(form->int4_bitmask(), header, *form);
  } else if (header.kind == FormKind::bitmask) {
    fault = fault_of(form->bitmask(), header);
    if (fault.empty() && int8)
      fault = fault_of_int8(static_cast<const std::int8_t*>(form->bitmask().values), form->nnz(),
                            form->scales(), form->rows());
  } else if (header.kind == FormKind::rows) {
    fault = fault_of(form->int8_rows(), header);
  } else if (header.kind == FormKind::panels) {
    fault = fault_of(form->panels(), header);
  } else {
    fault = int4   ? fault_of(form->int4_slots(), header, *form)
            : int8 ? fault_of(form->int8_slots(), header, *form)
                   : fault_of(form->slots(), header);
  }
  if (!fault.empty()) refuse("damage (" + fault + ")", "a whole form");
  if (header.kind == FormKind::slots && !int8 && !int4) {
    const FormPtr bitmask = bitmask_of_slots(*form);
    if (rows_share(bitmask->bitmask().words, header.rows, header.cols) != (header.shared_rows != 0))
      refuse(header.shared_rows, "rows that share columns where its header says so, and only there");
  }
  return form;
}

BitmaskView Form::bitmask() const {
  const FormHeader& h = header();
  return {h.rows,
          h.cols,
          words_for(h.cols),
          reinterpret_cast<const std::uint64_t*>(data_ + h.sections[0]),
          reinterpret_cast<const std::uint64_t*>(data_ + h.sections[1]),
          data_ + h.sections[2]};
}

PanelView Form::panels() const {
  const FormHeader& h = header();
  return {h.rows,
          h.cols,
          h.depth,
          panel_depth_blocks(h.cols, h.depth),
          h.shared_rows != 0,
          reinterpret_cast<const PanelBlock*>(data_ + h.sections[0]),
          reinterpret_cast<const std::uint16_t*>(data_ + h.sections[1]),
          data_ + h.sections[2],
          data_ + h.sections[3]};
}

const std::int8_t* Form::levels() const {
  return reinterpret_cast<const std::int8_t*>(data_ + header().sections[5]);
}

const float* Form::scales() const { return reinterpret_cast<const float*>(data_ + header().sections[3]); }

Int8RowsView Form::int8_rows() const {
  const FormHeader& h = header();
  return {h.rows, h.cols, reinterpret_cast<const std::int8_t*>(data_ + h.sections[0]),
          reinterpret_cast<const float*>(data_ + h.sections[1])};
}

Int8View Form::int8_slots() const {
  const FormHeader& h = header();
  const std::size_t groups = (h.rows + h.units - 1) / h.units, lanes = groups * h.units;
  const auto* const begin = reinterpret_cast<const std::uint64_t*>(data_ + h.sections[0]);
  const auto* const row = reinterpret_cast<const std::uint32_t*>(data_ + h.sections[1]);
  return {h.rows,
          h.cols,
          h.units,
          h.depth,
          begin,
          h.depth == 16 ? begin + groups + 1 : nullptr,
          row,
          reinterpret_cast<const std::int32_t*>(row + lanes),
          reinterpret_cast<const float*>(row + 2 * lanes),
          reinterpret_cast<const std::uint16_t*>(data_ + h.sections[2]),
          reinterpret_cast<const std::uint8_t*>(data_ + h.sections[3])};
}

Int4BitmaskView Form::int4_bitmask() const {
  const FormHeader& h = header();
  return {h.rows,
          h.cols,
          h.width,
          reinterpret_cast<const std::uint64_t*>(data_ + h.sections[0]),
          reinterpret_cast<const float*>(data_ + h.sections[1]),
          reinterpret_cast<const std::uint16_t*>(data_ + h.sections[2]),
          reinterpret_cast<const std::uint64_t*>(data_ + h.sections[3]),
          reinterpret_cast<const std::uint8_t*>(data_ + h.sections[4]),
          levels()};
}

Int4View Form::int4_slots() const {
  const FormHeader& h = header();
  const auto* const row = reinterpret_cast<const std::uint32_t*>(data_ + h.sections[1]);
  return {h.rows,
          h.cols,
          h.units,
          h.width,
          h.depth,
          reinterpret_cast<const std::uint32_t*>(data_ + h.sections[0]),
          row,
          reinterpret_cast<const float*>(row + (h.rows + h.units - 1) / h.units * h.units),
          reinterpret_cast<const std::uint16_t*>(data_ + h.sections[2]),
          reinterpret_cast<const std::uint8_t*>(data_ + h.sections[3]),
          reinterpret_cast<const std::uint8_t*>(data_ + h.sections[4]),
          levels()};
}

SlotView Form::slots() const {
  const FormHeader& h = header();
  return {h.rows,
          h.cols,
          h.depth,
          h.units == h.steps * h.depth,
          reinterpret_cast<const SlotStart*>(data_ + h.sections[0]),
          reinterpret_cast<const std::uint8_t*>(data_ + h.sections[1]),
          data_ + h.sections[2],
          reinterpret_cast<const std::uint16_t*>(data_ + h.sections[3]),
          reinterpret_cast<const std::uint8_t*>(data_ + h.sections[4]),
          data_ + h.sections[5]};
}

FormPtr bitmask_of(const Form& other) {
  if (other.dtype() == DType::i4) return int4_bitmask_of(int4_weights_of(other));
  if (other.kind() == FormKind::panels) return bitmask_of_panels(other);
  if (other.kind() == FormKind::rows) return bitmask_of_int8_rows(other);
  return other.dtype() == DType::i8 ? bitmask_of_int8_slots(other) : bitmask_of_slots(other);
}

PackedMatrix::PackedMatrix(const std::vector<FormPtr>& forms, bool trusted) {
  if (forms.empty()) throw std::invalid_argument(expected("buffers", "none", "at least one", "pass one"));
  for (const FormPtr& form : forms) {
    const char* const name = name_of(form->kind());
    if (find(form->kind()) != nullptr)
      throw std::invalid_argument(
          expected("buffers", std::string("two ") + name, "one of each form", "leave one out"));
    const Form& first = *forms.front();
    if (form->rows() != first.rows() || form->cols() != first.cols() || form->nnz() != first.nnz() ||
        form->dtype() != first.dtype() || form->header().width != first.header().width ||
        form->header().shared_rows != first.header().shared_rows)
      throw std::invalid_argument(
          expected("buffers", "different sizes or types", "forms of one weight", "pass those of one weight"));
    insert(form);
  }
  if (trusted || forms.size() == 1) return;
  const FormPtr first = get(FormKind::bitmask);
  for (const FormPtr& form : forms) {
    if (form->kind() == FormKind::bitmask) continue;
    if (!same(*first, *bitmask_of(*form)))
      throw std::invalid_argument(
          expected("buffers", "different weights", "forms of one weight", "pass those of one weight"));
  }
}

FormPtr PackedMatrix::get(FormKind kind) const {
  if (const FormPtr& form = find(kind); form != nullptr) return form;
  const DType dtype = any().dtype();
  const bool rounded = dtype == DType::i8 || dtype == DType::i4;
  if (rounded ? kind == FormKind::panels || (dtype == DType::i4 && kind == FormKind::rows)
              : kind == FormKind::rows)
    throw std::invalid_argument(expected("form", quoted(name_of(kind)),
                                         dtype == DType::i8   ? "bitmask, slots or rows, for int8 values"
                                         : dtype == DType::i4 ? "bitmask or slots, for int4 values"
                                                              : "bitmask, panels or slots, for float values",
                                         "build one of them"));
  if (dtype == DType::i4) return kind == FormKind::slots ? int4_slots_of(any()) : bitmask_of(any());
  const FormPtr& held = find(FormKind::bitmask);
  const FormPtr bitmask = held != nullptr ? held : bitmask_of(any());
  if (kind == FormKind::bitmask) return bitmask;
  if (kind == FormKind::rows) return int8_rows_of(*bitmask);
  if (kind == FormKind::panels) return panels_of(*bitmask);
  return dtype == DType::i8 ? int8_slots_of(*bitmask) : slots_of(*bitmask);
}

void PackedMatrix::bits(std::uint8_t* to) const {
  if (any().dtype() == DType::i4) {
    copy_rows(int4_weights_of(any()).view(), to);
    return;
  }
  copy_rows(get(FormKind::bitmask)->bitmask(), to);
}

void PackedMatrix::values(void* to) const {
  if (any().dtype() == DType::i4) {
    int4_weights_of(any()).codes(static_cast<std::uint8_t*>(to));
    return;
  }
  const FormPtr form = get(FormKind::bitmask);
  const std::size_t bytes = form->nnz() * item_size(form->dtype());
  if (bytes > 0) std::memcpy(to, form->bitmask().values, bytes);
}

void PackedMatrix::scales(float* to) const {
  if (any().dtype() == DType::i4) {
    const Int4Weights w = int4_weights_of(any());
    std::transform(w.scales.begin(), w.scales.end(), to, bfloat_to_float);
    return;
  }
  const FormPtr form = get(FormKind::bitmask);
  if (form->rows() > 0) std::memcpy(to, form->scales(), form->rows() * sizeof(float));
}

void PackedMatrix::unpack(void* to) const {
  if (const FormPtr& rows = find(FormKind::rows); rows != nullptr)
    return unpack_rows(*rows, static_cast<float*>(to));
  if (any().dtype() == DType::i4) {
    const Int4Weights w = int4_weights_of(any());
    return unpack_scaled(w.view(), static_cast<float*>(to),
                         [&](std::size_t r, std::size_t c) { return w.scale(r, c / w.width); });
  }
  const FormPtr form = get(FormKind::bitmask);
  const BitmaskView w = form->bitmask();
  if (form->dtype() == DType::i8)
    return unpack_scaled(w, static_cast<float*>(to),
                         [&](std::size_t r, std::size_t) { return form->scales()[r]; });
  with_bits(item_size(form->dtype()), [&](auto width) {
    using Bits = decltype(width);
    RowTasks(w.rows, w.cols).run([&](std::size_t, std::size_t r) {
      Bits* const row = static_cast<Bits*>(to) + r * w.cols;
      const Bits* from = static_cast<const Bits*>(w.values) + w.row_start[r];
      std::fill(row, row + w.cols, Bits{0});
      for_each_bit(w.words + r * w.row_words, 0, w.row_words, [&](std::size_t c) { row[c] = *from++; });
    });
  });
}

}  // namespace sparsam
