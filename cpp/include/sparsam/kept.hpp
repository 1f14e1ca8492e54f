#pragma once
#include <cstddef>

namespace sparsam {

// What a mask keeps of some elements.
struct Kept {
  std::size_t all = 0;
  std::size_t nonzero = 0;  // of these, how many are not zero
};

}  // namespace sparsam
