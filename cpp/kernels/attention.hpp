// Arguments of the kernel of attention, and its place in the table. Plain data; no STL.
#pragma once
#include <cstddef>
#include <cstdint>

namespace sparsam {

// Rows of `scores` that a kernel works on together are kAttentionRows at most, and its vectors of keys come
// in pairs: rows of scores and of packed keys have this length.
constexpr std::size_t kAttentionRows = 8, kAttentionStep = 32;
constexpr std::size_t attention_width(std::size_t keys) {
  return (keys + kAttentionStep - 1) / kAttentionStep * kAttentionStep;
}

// One head of one sequence: out = softmax(scale q k^T + mask) v. q [queries x depth], k and v [keys x depth],
// out [queries x depth], each row a number of floats after the one before.
struct AttentionHead {
  std::size_t queries, keys, depth;  // none is 0; depth is a multiple of 16
  float scale;
  const float *q, *k, *v;
  std::size_t q_stride, k_stride, v_stride;
  const std::uint8_t* kept;  // not 0 where a query sees a key; or null
  const float* added;        // to the scores; or null
  std::size_t mask_stride;   // from one query to the next; 0 where all have the same
  float* out;
  std::size_t out_stride;
  float* memory;  // room for (depth + kAttentionRows) * attention_width(keys) floats, 64-byte aligned
};

struct AttentionKernels {
  // A query that sees no key (all of its scores are -infinity) gets zeros. A NaN among the scores of a query
  // makes its row of out NaN.
  void (*attend)(const AttentionHead& head);
};

}  // namespace sparsam
