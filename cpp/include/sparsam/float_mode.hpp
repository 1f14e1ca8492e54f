// How a thread computes with floating-point numbers: rounding, and whether numbers below the normal range
// count as zero. Programs switch the latter on for speed (torch.set_flush_denormal); magnitudes must be
// compared without it.
#pragma once
#include <cstdint>

namespace sparsam {

std::uint64_t float_mode();  // of the calling thread; 0 where the machine's mode is not known
void set_float_mode(std::uint64_t mode);
std::uint64_t standard_float_mode();  // the calling thread's, but rounding to nearest and keeping subnormals

// Sets the mode where it is another one: a write to the register stalls the pipeline.
inline void change_float_mode(std::uint64_t from, std::uint64_t to) {
  if (from != to) set_float_mode(to);
}

// IEEE arithmetic in the calling thread until the end of the scope.
class StandardFloats {
 public:
  StandardFloats() : before_(float_mode()), standard_(standard_float_mode()) {
    change_float_mode(before_, standard_);
  }
  ~StandardFloats() { change_float_mode(standard_, before_); }
  StandardFloats(const StandardFloats&) = delete;
  StandardFloats& operator=(const StandardFloats&) = delete;

 private:
  std::uint64_t before_, standard_;
};

}  // namespace sparsam
