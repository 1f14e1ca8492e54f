// Bit masks: element i of the C order is bit i % 64 of word i / 64; bits past the end are 0.
#pragma once
#include <cstddef>
#include <cstdint>

#include "sparsam/views.hpp"

namespace sparsam {

constexpr std::size_t words_for(std::size_t n) { return (n + 63) / 64; }

std::size_t count_bits(const std::uint64_t* words, std::size_t n_words);

// out = array where the bit is set, +0 elsewhere; out has the array's type and shape and may be the same
// memory. Returns how many elements are kept and not zero.
std::size_t apply_mask(const View& array, const std::uint64_t* words, const View& out);

}  // namespace sparsam
