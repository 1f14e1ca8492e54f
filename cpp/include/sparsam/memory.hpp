// A block of memory that is not cleared, aligned to cache lines, and on huge pages unless it is small: small
// pages lie scattered, so that what two threads read together evicts itself from their L2 caches and each
// fetches it from the other's; and the first touch of many small pages can take longer than packing into
// them.
#pragma once
#include <cstddef>
#include <memory>

namespace sparsam {

class Memory {
 public:
  Memory() = default;
  // Up to some MiB it shares huge pages with other blocks, which come back when the last of them is gone: for
  // what stays as long as its neighbours, such as weights.
  explicit Memory(std::size_t bytes);

  // On pages of its own.
  static Memory alone(std::size_t bytes);

  // `bytes` and behind them kReadable zeros, which kernels may read and do not use.
  static constexpr std::size_t kReadable = 64;
  static Memory readable_past(std::size_t bytes);

  std::size_t bytes() const { return bytes_; }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_.get());
  }

 private:
  std::shared_ptr<char> data_;
  std::size_t bytes_ = 0;
};

}  // namespace sparsam
