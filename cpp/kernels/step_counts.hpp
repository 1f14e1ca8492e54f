// The steps of a word of 64 columns in the bitmask form: where their values begin. Include after defining
// SPARSAM_TARGET.
#pragma once
#include <cstddef>
#include <cstdint>

namespace sparsam::SPARSAM_TARGET {
namespace {

// For machines that count bits in one instruction.
template <std::size_t kLanes>
class StepCounts {
 public:
  explicit StepCounts(std::uint64_t word) : word_(word) {}
  std::size_t before(std::size_t step) const { return count(step == 0 ? 0 : word_ << (64 - step * kLanes)); }
  std::size_t all() const { return count(word_); }

 private:
  static std::size_t count(std::uint64_t bits) {
    return static_cast<std::size_t>(__builtin_popcountll(bits));
  }

  std::uint64_t word_;
};

// The values of a step as they lie in memory, for machines that expand them in each product.
template <class Value>
struct PackedStep {
  const Value* values;
  std::uint32_t bits;
};

}  // namespace
}  // namespace sparsam::SPARSAM_TARGET
