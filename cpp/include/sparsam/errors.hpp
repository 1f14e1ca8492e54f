// The one form of an error's message: `WHAT: expected X; got Y; do Z`, as in sparsam.inputs.checks.expected.
#pragma once
#include <string>
#include <type_traits>

namespace sparsam {

inline std::string quoted(const std::string& text) { return "'" + text + "'"; }

// The value that was passed: text unchanged, numbers in decimal.
template <class Got>
std::string expected(const std::string& what, const Got& got, const std::string& wanted,
                     const std::string& action) {
  std::string came;
  if constexpr (std::is_arithmetic_v<Got>)
    came = std::to_string(got);
  else
    came = got;
  return what + ": expected " + wanted + "; got " + came + "; " + action;
}

}  // namespace sparsam
