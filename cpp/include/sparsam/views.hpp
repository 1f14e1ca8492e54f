// Strided arrays, and how kernels read and write them in contiguous pieces.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "sparsam/dtypes.hpp"

namespace sparsam {

struct Dim {
  std::size_t size;
  std::ptrdiff_t stride;  // bytes
};

// An array of any rank and strides. Index i means the i-th element in C order. Adjacent dimensions that lie
// contiguously are merged, so a contiguous array has one dimension. Misaligned data counts as not contiguous.
class View {
 public:
  static constexpr std::size_t kMaxDims = 64;  // as many as NumPy has

  View(void* data, DType dtype, const std::vector<Dim>& dims);

  DType dtype() const { return dtype_; }
  std::size_t size() const { return size_; }
  bool contiguous() const { return contiguous_; }

  // Elements [start, start + n) as keys or bits of width sizeof(Bits). Points into the array where it can;
  // otherwise copies to `buffer` (n elements). Widens float16 and bfloat16 to float32, and all to float64,
  // where Bits is wider than the array's own type; that is exact and keeps the order of magnitudes.
  template <class Bits>
  const Bits* read(std::size_t start, std::size_t n, Bits* buffer) const;

  // Writes elements [start, start + n) from `values`, which has the array's own width.
  template <class Bits>
  void write(std::size_t start, std::size_t n, const Bits* values) const;

  // Where kernels may store elements [start, ...) directly; null for an array that is not contiguous.
  template <class Bits>
  Bits* direct(std::size_t start) const {
    return contiguous_ ? reinterpret_cast<Bits*>(data_) + start : nullptr;
  }

  // The same elements in the order of memory, for passes in which the order does not matter.
  View in_memory_order() const;

 private:
  template <class Visit>
  void for_each_run(std::size_t start, std::size_t n, Visit&& visit) const;

  char* data_;
  DType dtype_;
  std::size_t size_;
  bool contiguous_;
  std::vector<Dim> dims_;
};

// Several views as an argument: a vector of them, or a single one; neither is copied.
class Views {
 public:
  Views(const std::vector<View>& views) : first_(views.data()), size_(views.size()) {}
  Views(const View& view) : first_(&view), size_(1) {}

  const View* begin() const { return first_; }
  const View* end() const { return first_ + size_; }
  std::size_t size() const { return size_; }
  bool empty() const { return size_ == 0; }
  const View& operator[](std::size_t i) const { return first_[i]; }

 private:
  const View* first_;
  std::size_t size_;
};

}  // namespace sparsam
