// The floating-point mode of a thread: its rounding, and whether subnormal numbers count as zero. Programs
// enable the latter for speed (torch.set_flush_denormal); magnitudes must be compared with it disabled.
#pragma once
#include <cstdint>

namespace sparsam {

std::uint64_t float_mode();  // of the calling thread; 0 on machines whose mode register is not supported
void set_float_mode(std::uint64_t mode);
std::uint64_t standard_float_mode();  // the calling thread's, but rounding to nearest and keeping subnormals

// Sets the mode if it differs from the current one, since a write to the register stalls the pipeline.
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
