// A block of uninitialised memory, aligned to cache lines, and on huge pages if it is large: packed weights
// are streamed, and the first touch of small pages can take longer than the packing itself.
#pragma once
#include <cstddef>
#include <memory>

namespace sparsam {

// The bytes of the cache lines that so many bytes need.
constexpr std::size_t whole_lines(std::size_t bytes) { return (bytes + 63) / 64 * 64; }

class Memory {
 public:
  Memory() = default;
  explicit Memory(std::size_t bytes);

  std::size_t bytes() const { return bytes_; }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_.get());
  }

 private:
  struct Free {
    std::size_t mapped;  // bytes that were mapped; 0 if it came from the heap
    void operator()(char* p) const;
  };
  std::unique_ptr<char, Free> data_;
  std::size_t bytes_ = 0;
};

}  // namespace sparsam
