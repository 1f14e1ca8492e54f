#include "forms.hpp"

#include <iterator>
#include <stdexcept>

#include "sparsam/masks.hpp"

namespace sparsam {
namespace {

constexpr std::size_t kLargest = std::size_t{1} << 40;  // of a side, and of both multiplied

std::size_t aligned(std::size_t n) {
  return (n + FormHeader::kAlign - 1) / FormHeader::kAlign * FormHeader::kAlign;
}

[[noreturn]] void refuse(const std::string& what) {
  throw std::invalid_argument("buffer: " + what + "; pack the weight again");
}

// Of a buffer of that many bytes. Checks all that the sizes of sections are computed from, then these.
void check_header(const FormHeader& h, std::size_t bytes) {
  if (std::memcmp(h.magic, FormHeader::kMagic, sizeof h.magic) != 0)
    refuse("expected a form of a packed weight, which begins with 'sparsam'");
  if (h.version != FormHeader::kVersion)
    refuse("expected version " + std::to_string(FormHeader::kVersion) + "; got " + std::to_string(h.version));
  const bool panels = h.kind == FormKind::panels;
  if (!panels && h.kind != FormKind::bitmask)
    refuse("expected form 1 (bitmask) or 2 (panels); got " + std::to_string(static_cast<int>(h.kind)));
  if (h.dtype > static_cast<std::uint8_t>(DType::f32))
    refuse("expected values of dtype 0, 1 or 2; got " + std::to_string(h.dtype));
  if (h.shared_rows != 0 && (h.shared_rows != 4 || h.rows == 0 || h.rows % 4 != 0))
    refuse("expected 0, or 4 for rows in fours, as the number of rows that share columns; got " +
           std::to_string(h.shared_rows));
  if (h.rows > kLargest || h.cols > kLargest || (h.cols > 0 && h.rows > kLargest / h.cols) ||
      h.nnz > h.rows * h.cols)
    refuse("expected at most 2^40 weights, and no more nonzero ones");
  const bool depth_fits = panels ? h.depth > 0 && h.depth <= kMaxDepth && h.depth % 64 == 0 : h.depth == 0;
  if (!depth_fits || h.units > bytes || h.steps > bytes || (!panels && h.units + h.steps != 0))
    refuse("expected a depth of 64 to " + std::to_string(kMaxDepth) + ", and units and steps that fit in it");
  const FormHeader expected = laid_out(h);
  if (std::memcmp(&expected, &h, sizeof h) != 0 || expected.bytes != bytes)
    refuse("expected " + std::to_string(expected.bytes) +
           " bytes, with the sections that its counts demand; got " + std::to_string(bytes));
}

}  // namespace

FormHeader laid_out(FormHeader h) {
  const std::size_t item = item_size(static_cast<DType>(h.dtype));
  std::size_t sizes[4] = {8 * h.rows * words_for(h.cols), 8 * (h.rows + 1), h.nnz * item, 0};
  const std::size_t n = h.kind == FormKind::bitmask ? 3 : 4;
  if (h.kind == FormKind::panels) {
    sizes[0] = (panel_blocks(h.rows, h.cols, h.depth) + 1) * sizeof(PanelBlock);
    sizes[1] = h.units * kUnitHeader * sizeof(std::uint16_t);
    sizes[2] = h.steps * (h.shared_rows != 0 ? 1 : 4) * offset_bytes(h.depth);
    sizes[3] = 4 * h.steps * item;
  }
  std::size_t at = sizeof(FormHeader);
  for (std::size_t i = 0; i < 4; ++i) {
    h.sections[i] = i < n ? at : 0;
    at += aligned(sizes[i]);
  }
  h.bytes = at + FormHeader::kReadable;
  h.zero = 0;
  std::fill(std::begin(h.reserved), std::end(h.reserved), 0);
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
    throw std::invalid_argument("buffer: expected an address that is a multiple of 8; copy it");
  if (bytes < sizeof(FormHeader))
    refuse("expected at least " + std::to_string(sizeof(FormHeader)) + " bytes; got " +
           std::to_string(bytes));
  FormPtr form(new Form(static_cast<const char*>(data), std::move(owner)));
  const FormHeader& header = form->header();
  check_header(header, bytes);
  if (trusted) return form;
  const std::string fault =
      header.kind == FormKind::bitmask ? fault_of(form->bitmask(), header) : fault_of(form->panels(), header);
  if (!fault.empty()) refuse(fault);
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

PackedMatrix::PackedMatrix(const std::vector<FormPtr>& forms, bool trusted) {
  if (forms.empty()) throw std::invalid_argument("buffers: expected at least one; got none");
  for (const FormPtr& form : forms) {
    const char* const name = name_of(form->kind());
    if (find(form->kind()) != nullptr)
      throw std::invalid_argument(std::string("buffers: expected one of each form; got two ") + name);
    const Form& first = *forms.front();
    if (form->rows() != first.rows() || form->cols() != first.cols() || form->nnz() != first.nnz() ||
        form->dtype() != first.dtype() || form->header().shared_rows != first.header().shared_rows)
      throw std::invalid_argument("buffers: expected forms of one weight; got different sizes or types");
    insert(form);
  }
  if (trusted || forms.size() == 1) return;
  const BitmaskView a = find(FormKind::bitmask)->bitmask();
  const FormPtr again = bitmask_of(*find(FormKind::panels));
  const BitmaskView b = again->bitmask();
  if (std::memcmp(a.words, b.words, 8 * a.rows * a.row_words) != 0 ||
      std::memcmp(a.values, b.values, again->nnz() * item_size(again->dtype())) != 0)
    throw std::invalid_argument("buffers: expected forms of one weight; got different weights");
}

FormPtr PackedMatrix::get(FormKind kind) const {
  if (const FormPtr& form = find(kind); form != nullptr) return form;
  return kind == FormKind::bitmask ? bitmask_of(any()) : panels_of(any());
}

void PackedMatrix::bits(std::uint8_t* to) const {
  const FormPtr form = get(FormKind::bitmask);
  const BitmaskView w = form->bitmask();
  const std::size_t row_bytes = (w.cols + 7) / 8;
  for (std::size_t r = 0; r < w.rows && row_bytes > 0; ++r)
    std::memcpy(to + r * row_bytes, w.words + r * w.row_words, row_bytes);
}

void PackedMatrix::values(void* to) const {
  const FormPtr form = get(FormKind::bitmask);
  const std::size_t bytes = form->nnz() * item_size(form->dtype());
  if (bytes > 0) std::memcpy(to, form->bitmask().values, bytes);
}

void PackedMatrix::unpack(void* to) const {
  const FormPtr form = get(FormKind::bitmask);
  const BitmaskView w = form->bitmask();
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
