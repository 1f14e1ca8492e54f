// Data of many arrays as one sequence of chunks, each of which lies in one array.
#pragma once
#include <algorithm>
#include <memory>
#include <vector>

#include "sparsam/check.hpp"
#include "sparsam/threads.hpp"
#include "sparsam/views.hpp"

namespace sparsam {

// Below this many elements a parallel region costs more than it saves (about 30 microseconds of work).
constexpr std::size_t kSerialBelow = std::size_t{1} << 18;

struct Chunk {
  std::size_t array, start, size;
};

// `step` is a multiple of 64, so that no two chunks share a mask word.
inline std::vector<Chunk> cut(Views arrays, std::size_t step) {
  std::vector<Chunk> chunks;
  for (std::size_t a = 0; a < arrays.size(); ++a)
    for (std::size_t start = 0; start < arrays[a].size(); start += step)
      chunks.push_back({a, start, std::min(step, arrays[a].size() - start)});
  return chunks;
}

// One buffer per worker for chunks that must be gathered; none where every array is contiguous.
template <class Bits>
class Buffers {
 public:
  Buffers(std::size_t workers, std::size_t elements, bool needed)
      : workers_(workers), elements_(elements), data_(needed ? new Bits[workers * elements] : nullptr) {}
  Bits* of(std::size_t worker) const {
    SPARSAM_CHECK(worker < workers_);
    return data_ == nullptr ? nullptr : data_.get() + worker * elements_;
  }

 private:
  [[maybe_unused]] std::size_t workers_;
  std::size_t elements_;
  std::unique_ptr<Bits[]> data_;
};

// Calls body with a value of the unsigned type of that many bytes.
template <class Body>
decltype(auto) with_bits(std::size_t bytes, Body&& body) {
  if (bytes == 2) return body(std::uint16_t{});
  if (bytes == 4) return body(std::uint32_t{});
  return body(std::uint64_t{});
}

}  // namespace sparsam
