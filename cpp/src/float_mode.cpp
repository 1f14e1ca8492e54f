#include "sparsam/float_mode.hpp"

namespace sparsam {

// Not inline: a compiler may move arithmetic across the change of mode, but not across a call it cannot see
// into.
#if defined(__x86_64__)
namespace {
// MXCSR: denormals are zeros (6), rounding (13, 14), flush to zero (15).
constexpr std::uint64_t kDeviantBits = 0x0040 | 0x6000 | 0x8000;
}  // namespace
std::uint64_t float_mode() { return __builtin_ia32_stmxcsr(); }
void set_float_mode(std::uint64_t mode) { __builtin_ia32_ldmxcsr(static_cast<unsigned>(mode)); }
#elif defined(__aarch64__)
namespace {
// FPCR: flush float16 to zero (19), rounding (22, 23), flush to zero (24).
constexpr std::uint64_t kDeviantBits = 0x0008'0000 | 0x00c0'0000 | 0x0100'0000;
}  // namespace
std::uint64_t float_mode() {
  std::uint64_t mode;
  asm volatile("mrs %0, fpcr" : "=r"(mode));
  return mode;
}
void set_float_mode(std::uint64_t mode) { asm volatile("msr fpcr, %0" : : "r"(mode)); }
#else
namespace {
constexpr std::uint64_t kDeviantBits = 0;
}  // namespace
std::uint64_t float_mode() { return 0; }
void set_float_mode(std::uint64_t) {}
#endif

std::uint64_t standard_float_mode() { return float_mode() & ~kDeviantBits; }

}  // namespace sparsam
