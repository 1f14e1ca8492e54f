// Attention for short sequences: softmax(scale q k^T + mask) v of every head, in float32.
#pragma once
#include <cstddef>
#include <cstdint>

namespace sparsam {

// Tensors [sequences x heads x positions x depth] as they lie in memory; the numbers of a position side by
// side. Strides are in elements, and may be 0.
struct HeadsView {
  const float* data;
  std::size_t sequence_stride, head_stride, stride;
};

// What a query sees of the keys: bytes that are 0 where it does not, or floats that are added to the scores.
// One of both is null, or both. The keys of a query lie side by side.
struct MaskView {
  const std::uint8_t* kept;
  const float* added;
  std::size_t sequence_stride, head_stride, stride;
};

struct AttentionShape {
  std::size_t sequences, heads, queries, keys, depth;
};

// out [sequences x queries x heads x depth], contiguous, which overlaps nothing. A query that sees no key
// gets zeros. Throws std::invalid_argument unless depth is a multiple of 16.
void attention(const AttentionShape& shape, const HeadsView& q, const HeadsView& k, const HeadsView& v,
               const MaskView& mask, float scale, float* out);

}  // namespace sparsam
