// Elements in chunks, for selection: from one buffer, or from arrays of any layout and mixed types.
#pragma once
#include <algorithm>
#include <cstddef>
#include <vector>

#include "chunks.hpp"
#include "sparsam/views.hpp"

namespace sparsam {

// Elements per chunk: 256 KiB of float32, half of a small L2 cache.
constexpr std::size_t kStep = std::size_t{1} << 16;

template <class Bits>
constexpr Bits key_of(Bits bits) {
  return static_cast<Bits>(bits & (static_cast<Bits>(~Bits{0}) >> 1));
}

template <class Bits>
struct ContiguousSource {
  const Bits* data;
  std::size_t size;

  static constexpr bool gathers = false;
  std::size_t chunks() const { return (size + kStep - 1) / kStep; }
  std::size_t offset(std::size_t chunk) const { return chunk * kStep; }
  std::size_t chunk_size(std::size_t chunk) const { return std::min(kStep, size - chunk * kStep); }
  const Bits* read(std::size_t chunk, std::size_t skip, [[maybe_unused]] std::size_t n, Bits*) const {
    SPARSAM_CHECK(chunk * kStep + skip + n <= size);
    return data + chunk * kStep + skip;
  }
};

template <class Bits>
class PooledSource {
 public:
  explicit PooledSource(const std::vector<View>& arrays) : arrays_(arrays), chunks_(cut(arrays, kStep)) {
    offsets_.reserve(chunks_.size());
    for (const Chunk& c : chunks_) {
      offsets_.push_back(size);
      size += c.size;
    }
    for (const View& v : arrays) gathers |= !v.contiguous() || item_size(v.dtype()) != sizeof(Bits);
  }
  std::size_t size = 0;
  bool gathers = false;
  std::size_t chunks() const { return chunks_.size(); }
  std::size_t offset(std::size_t chunk) const { return offsets_[chunk]; }
  std::size_t chunk_size(std::size_t chunk) const { return chunks_[chunk].size; }
  const Bits* read(std::size_t chunk, std::size_t skip, std::size_t n, Bits* buffer) const {
    SPARSAM_CHECK(chunk < chunks_.size() && skip + n <= chunks_[chunk].size);
    return arrays_[chunks_[chunk].array].read(chunks_[chunk].start + skip, n, buffer);
  }

 private:
  const std::vector<View>& arrays_;
  std::vector<Chunk> chunks_;
  std::vector<std::size_t> offsets_;
};

}  // namespace sparsam
