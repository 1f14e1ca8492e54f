// Forms of a packed weight. Each is one flat buffer that describes itself and holds no pointer, so that it
// can live in memory of ours, a NumPy array, a torch tensor or a mapped file, and move between them
// (docs/formats.md, byte by byte). Each form alone gives the weight back exactly.
#pragma once
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "sparsam/views.hpp"

namespace sparsam {

struct BitmaskView;
struct Int4BitmaskView;
struct Int4View;
struct Int8RowsView;
struct Int8View;
struct PanelView;
struct SlotView;

enum class FormKind : std::uint8_t { bitmask = 1, panels = 2, slots = 3, rows = 4 };
constexpr std::array<FormKind, 4> kFormKinds = {FormKind::bitmask, FormKind::panels, FormKind::slots,
                                                FormKind::rows};
constexpr std::array<const char*, kFormKinds.size()> kFormNames = {"bitmask", "panels", "slots", "rows"};

inline const char* name_of(FormKind kind) { return kFormNames[static_cast<std::size_t>(kind) - 1]; }

// The first bytes of a form. Sections follow in the order of `sections`, each at a multiple of 64 from the
// start; the counts determine all of them. Behind the last section kReadable bytes may be read.
struct FormHeader {
  static constexpr char kMagic[8] = {'s', 'p', 'a', 'r', 's', 'a', 'm', '\0'};
  static constexpr std::uint32_t kVersion = 2;
  static constexpr std::size_t kAlign = 64, kReadable = 64;

  char magic[8];
  std::uint32_t version;
  FormKind kind;
  std::uint8_t dtype;        // DType of the values
  std::uint8_t shared_rows;  // 4 where every aligned four rows share their columns, else 0
  std::uint8_t zero;
  std::uint64_t rows, cols, nnz;
  std::uint64_t depth;  // of panels; of slots: columns of a window (int4: its steps, or 0); else 0
  std::uint64_t units;  // of panels; of slots: values (int8, int4: rows of a group); else 0
  std::uint64_t steps;  // of panels and slots (int8, int4: pairs of steps); in a bitmask 0, but of int4
                        // values the bytes of codes
  std::uint64_t
      sections[6];      // bitmask: words, row_start, values and, of int8, scales; of int4: begin, zeros,
                        // scales, words, codes, levels;
                        // panels: blocks, headers, offsets, values; slots: groups, order, words, used,
                        // starts, values; of int8: begin, lanes, starts, codes; of int4: begin, lanes,
                        // scales, starts, codes, levels; rows: values, scales
  std::uint64_t bytes;  // of the whole buffer
  std::uint64_t width;  // of int4: columns that share a scale; of int8: see Taps; else 0
};
static_assert(sizeof(FormHeader) == 128);

// The kernel of a convolution with int8 values, whose slots have their columns in the order of `place`, so
// that the channels of a pixel are neighbours; 0 x 0 for other weights (and for kernels of 1 x 1, whose order
// is the same). In a header: height << 16 | width.
struct Taps {
  std::size_t height = 0, width = 0;

  static Taps of(std::uint64_t bits) {
    return {static_cast<std::size_t>(bits >> 16), static_cast<std::size_t>(bits & 0xffff)};
  }
  std::size_t count() const { return height * width; }
  std::uint64_t bits() const { return count() <= 1 ? 0 : std::uint64_t{height} << 16 | width; }
  bool fits(std::size_t cols) const {
    return count() != 0 && height <= 0xffff && width <= 0xffff && cols % count() == 0;
  }
  // Where column (channel, row, column) stands: (column, row, channel). And the inverse.
  std::size_t place(std::size_t column, std::size_t cols) const {
    const std::size_t n = count();
    return n == 0 ? column : (column % width * height + column % n / width) * (cols / n) + column / n;
  }
  std::size_t column(std::size_t place, std::size_t cols) const {
    const std::size_t n = count();
    if (n == 0) return place;
    const std::size_t tap = place / (cols / n);
    return place % (cols / n) * n + tap % height * width + tap / height;
  }
};

class Form;
using FormPtr = std::shared_ptr<const Form>;

class Form {
 public:
  // The form in memory that `owner` keeps alive and nobody changes. `data` is a multiple of 8. Everything
  // that a kernel relies on is checked, or with `trusted` only the header. Throws std::invalid_argument.
  static FormPtr adopt(const void* data, std::size_t bytes, std::shared_ptr<const void> owner, bool trusted);

  FormKind kind() const { return header().kind; }
  DType dtype() const { return static_cast<DType>(header().dtype); }
  std::size_t rows() const { return header().rows; }
  std::size_t cols() const { return header().cols; }
  std::size_t nnz() const { return header().nnz; }
  std::size_t bytes() const { return header().bytes; }
  const char* data() const { return data_; }
  const FormHeader& header() const { return *reinterpret_cast<const FormHeader*>(data_); }
  Taps taps() const { return dtype() == DType::i8 ? Taps::of(header().width) : Taps{}; }

  BitmaskView bitmask() const;        // of float and int8 values
  const float* scales() const;        // one a row, of a bitmask of int8 values
  const std::int8_t* levels() const;  // of int4 values
  PanelView panels() const;
  Int8RowsView int8_rows() const;
  Int8View int8_slots() const;
  Int4BitmaskView int4_bitmask() const;
  Int4View int4_slots() const;
  SlotView slots() const;  // of float values

 private:
  friend class FormWriter;
  Form(const char* data, std::shared_ptr<const void> owner) : owner_(std::move(owner)), data_(data) {}

  std::shared_ptr<const void> owner_;
  const char* data_;
};

// The bitmask of a rows x cols array of any strides, float16, bfloat16 or float32: a weight is pruned where
// it is exactly 0; or where its bit in `mask` is not set (element i of the array in C order: bit i % 64 of
// word i / 64), so that a weight that was kept and is 0 stays.
FormPtr pack_bitmask(const View& w, std::size_t rows, std::size_t cols);
FormPtr pack_bitmask(const View& w, std::size_t rows, std::size_t cols, const std::uint64_t* mask);

// From the form on disk: `bits` has ceil(cols / 8) bytes a row, lowest bit first; `values` the nnz values,
// row by row. Throws std::invalid_argument where they do not fit together.
FormPtr pack_bitmask(std::size_t rows, std::size_t cols, const std::uint8_t* bits, const View& values);

// int8 values, -64 to 64, of which 0 is pruned, with a scale for every row: rows x cols in C order. And
// from the form on disk, as above, with no value 0. Scales are positive, normal numbers. Of a convolution
// with its `taps`. Throws std::invalid_argument.
FormPtr pack_int8(const std::int8_t* w, std::size_t rows, std::size_t cols, const float* scales,
                  Taps taps = {});
FormPtr pack_int8(std::size_t rows, std::size_t cols, const std::uint8_t* bits, const std::int8_t* values,
                  std::size_t n_values, const float* scales, Taps taps = {});

// int4 values: levels of which 0 is pruned, `width` (64 or 128) columns of a row sharing a scale, a float32
// that bfloat16 can hold, up to 2^96: rows x ceil(cols / width). `levels` has 16, 0 first and then rising, of
// which only the first may be 0. And from the form on disk: codes, two in a byte, the first in its low half.
FormPtr pack_int4(const std::int8_t* w, std::size_t rows, std::size_t cols, std::size_t width,
                  const float* scales, const std::int8_t* levels);
FormPtr pack_int4(std::size_t rows, std::size_t cols, std::size_t width, const std::uint8_t* bits,
                  const std::uint8_t* codes, std::size_t n_bytes, const float* scales,
                  const std::int8_t* levels);

// One form of a weight from another. Panels are of float values. Slots of float values are made for the lanes
// of the active instruction set, and kernels of the others can read them; those of int8 and int4 values are
// for the best kernels that run now.
FormPtr bitmask_of(const Form& other);
FormPtr panels_of(const Form& bitmask);
FormPtr slots_of(const Form& bitmask);
FormPtr int8_slots_of(const Form& bitmask);
FormPtr int4_slots_of(const Form& other);
FormPtr int8_rows_of(const Form& bitmask);

// Rows of a weight in the form rows, as float32: n times its columns. Throws std::out_of_range for a number
// that none of its rows has.
void look_up(const Form& rows, const std::int64_t* ids, std::size_t n, float* to);

// rows x cols weights (out x in): up to one form of each kind, which say the same. A value: copies share the
// forms, and nothing in it changes while a copy is in use.
class PackedMatrix {
 public:
  explicit PackedMatrix(FormPtr form) { insert(std::move(form)); }

  // Throws std::invalid_argument where there is no form, or the forms differ; with `trusted`, only where
  // their headers do.
  PackedMatrix(const std::vector<FormPtr>& forms, bool trusted);

  const FormPtr& find(FormKind kind) const { return forms_[static_cast<std::size_t>(kind) - 1]; }
  const Form& any() const {
    return **std::find_if(forms_.begin(), forms_.end(), [](const FormPtr& form) { return form != nullptr; });
  }
  void insert(FormPtr form) { forms_[static_cast<std::size_t>(form->kind()) - 1] = std::move(form); }
  void erase(FormKind kind) { forms_[static_cast<std::size_t>(kind) - 1] = nullptr; }

  // The form that is held, or else one built from another; it is not kept.
  FormPtr get(FormKind kind) const;

  void bits(std::uint8_t* to) const;  // rows * ceil(cols / 8) bytes
  void values(void* to) const;        // nnz values, row by row; of int4 values ceil(nnz / 2) bytes of codes
  void scales(float* to) const;       // of int8 values, one a row; of int4, one a group of columns too
  void unpack(void* to) const;        // rows * cols elements in C order; of int8 and int4 values float32

 private:
  std::array<FormPtr, kFormKinds.size()> forms_;
};

}  // namespace sparsam
