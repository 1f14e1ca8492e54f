#include "sparsam/views.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <stdexcept>

#include "sparsam/check.hpp"
#include "sparsam/errors.hpp"

namespace sparsam {

std::uint64_t key_at_most(double value, DType t) {
  // Binary search over the ordered keys, which needs no rounding rule for each type.
  std::uint64_t low = 0, high = infinity_key(t);
  while (low < high) {
    const std::uint64_t middle = low + (high - low + 1) / 2;
    if (key_to_double(middle, t) <= value)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

View::View(void* data, DType dtype, const std::vector<Dim>& dims)
    : data_(static_cast<char*>(data)), dtype_(dtype), size_(1), contiguous_(false) {
  for (const Dim& d : dims) {
    size_ *= d.size;
    if (d.size == 1) continue;
    if (!dims_.empty() && dims_.back().stride == d.stride * static_cast<std::ptrdiff_t>(d.size))
      dims_.back() = {dims_.back().size * d.size, d.stride};
    else
      dims_.push_back(d);
  }
  if (dims_.size() > kMaxDims)
    throw std::invalid_argument(
        expected("array", dims_.size(), "at most " + std::to_string(kMaxDims) + " dimensions", "reshape it"));
  const auto width = static_cast<std::ptrdiff_t>(item_size(dtype));
  if (dims_.empty()) dims_.push_back({1, width});
  const bool aligned = reinterpret_cast<std::uintptr_t>(data) % item_size(dtype) == 0;
  contiguous_ = size_ == 0 || (dims_.size() == 1 && dims_[0].stride == width && aligned);
}

View View::in_memory_order() const {
  if (contiguous_) return *this;
  std::vector<Dim> dims = dims_;
  char* data = data_;
  for (Dim& d : dims) {
    if (d.stride >= 0) continue;
    data += d.stride * static_cast<std::ptrdiff_t>(d.size - 1);
    d.stride = -d.stride;
  }
  std::stable_sort(dims.begin(), dims.end(), [](const Dim& a, const Dim& b) { return a.stride > b.stride; });
  return View(data, dtype_, dims);
}

// Calls visit(pointer, byte stride, count) for the runs of constant stride that make up [start, start + n).
template <class Visit>
void View::for_each_run(std::size_t start, std::size_t n, Visit&& visit) const {
  SPARSAM_CHECK(start <= size_ && n <= size_ - start);
  if (n == 0) return;
  const std::size_t last = dims_.size() - 1;
  const Dim inner = dims_[last];
  std::array<std::size_t, kMaxDims> index;  // no allocation: tasks call this, and must not throw
  const char* p = data_;
  std::size_t rest = start;
  for (std::size_t i = dims_.size(); i-- > 0; rest /= dims_[i].size) {
    index[i] = rest % dims_[i].size;
    p += static_cast<std::ptrdiff_t>(index[i]) * dims_[i].stride;
  }
  while (true) {
    SPARSAM_CHECK(index[last] < inner.size);
    const std::size_t count = std::min(n, inner.size - index[last]);
    visit(p, inner.stride, count);
    n -= count;
    if (n == 0) return;
    p -= static_cast<std::ptrdiff_t>(index[last]) * inner.stride;  // to the start of the next run
    index[last] = 0;
    for (std::size_t i = last; i-- > 0;) {
      p += dims_[i].stride;
      if (++index[i] < dims_[i].size) break;
      p -= static_cast<std::ptrdiff_t>(dims_[i].size) * dims_[i].stride;
      index[i] = 0;
    }
  }
}

namespace {

template <class Bits>
Bits widen(const char* p, DType t) {
  if constexpr (sizeof(Bits) == 8) {
    return bit_cast<std::uint64_t>(load_double(p, t));
  } else if constexpr (sizeof(Bits) == 4) {
    return bit_cast<std::uint32_t>(static_cast<float>(load_double(p, t)));
  } else {
    Bits bits;
    std::memcpy(&bits, p, sizeof bits);
    return bits;
  }
}

}  // namespace

template <class Bits>
const Bits* View::read(std::size_t start, std::size_t n, Bits* buffer) const {
  SPARSAM_CHECK(start <= size_ && n <= size_ - start);
  const bool same = item_size(dtype_) == sizeof(Bits);
  if (same && contiguous_) return reinterpret_cast<const Bits*>(data_) + start;
  Bits* to = buffer;
  for_each_run(start, n, [&](const char* p, std::ptrdiff_t stride, std::size_t count) {
    if (same) {
      for (std::size_t i = 0; i < count; ++i, p += stride) std::memcpy(to + i, p, sizeof(Bits));
    } else {
      for (std::size_t i = 0; i < count; ++i, p += stride) to[i] = widen<Bits>(p, dtype_);
    }
    to += count;
  });
  return buffer;
}

template <class Bits>
void View::write(std::size_t start, std::size_t n, const Bits* values) const {
  for_each_run(start, n, [&](const char* p, std::ptrdiff_t stride, std::size_t count) {
    char* q = const_cast<char*>(p);
    for (std::size_t i = 0; i < count; ++i, q += stride) std::memcpy(q, values++, sizeof(Bits));
  });
}

template const std::uint16_t* View::read(std::size_t, std::size_t, std::uint16_t*) const;
template const std::uint32_t* View::read(std::size_t, std::size_t, std::uint32_t*) const;
template const std::uint64_t* View::read(std::size_t, std::size_t, std::uint64_t*) const;
template void View::write(std::size_t, std::size_t, const std::uint16_t*) const;
template void View::write(std::size_t, std::size_t, const std::uint32_t*) const;
template void View::write(std::size_t, std::size_t, const std::uint64_t*) const;

}  // namespace sparsam
