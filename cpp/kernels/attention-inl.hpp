// Attention of one head, written once over Floats. Include after activations-inl.hpp.
#pragma once
#include "activations-inl.hpp"
#include "attention.hpp"

namespace sparsam::SPARSAM_TARGET {
namespace {

// Keys in the lanes, so that a score is a sum over depth in one lane; and outputs in the lanes, so that an
// output is a sum over keys in one.
struct Attention {
  static constexpr std::size_t kLanes = Floats::kLanes, kRows = Doubles::kSums / 2, kPair = 2 * kLanes;
  static_assert(kRows <= kAttentionRows && kAttentionStep % kPair == 0);

  const AttentionHead& head;
  const std::size_t width = attention_width(head.keys);
  float* const keys = head.memory;  // [depth][width]
  float* const scores = head.memory + head.depth * width;

  void run() const {
    pack_keys();
    for (std::size_t first = 0; first < head.queries; first += kRows) {
      const std::size_t here = head.queries - first < kRows ? head.queries - first : kRows;
      const float* q[kRows];  // the last is repeated
      for (std::size_t r = 0; r < kRows; ++r)
        q[r] = head.q + (first + (r < here ? r : here - 1)) * head.q_stride;
      for (std::size_t j = 0; j < width; j += kPair) score(q, j);
      float scales[kRows] = {};
      for (std::size_t r = 0; r < here; ++r) hide(first + r, scores + r * width);
      if (here == kRows)
        weigh<kRows>(scores, scales);
      else
        for (std::size_t r = 0; r < here; ++r) weigh<1>(scores + r * width, scales + r);
      std::size_t c = 0;
      for (; c + kPair <= head.depth; c += kPair) gather<2>(first, here, scales, c);
      for (; c < head.depth; c += kLanes) gather<1>(first, here, scales, c);
    }
  }

 private:
  // Transposed, with zeros after the last.
  void pack_keys() const {
    for (std::size_t j = 0; j < width; j += kLanes)
      for (std::size_t d = 0; d < head.depth; d += kLanes) {
        Floats::Reg block[kLanes];
        for (std::size_t i = 0; i < kLanes; ++i)
          block[i] = j + i < head.keys ? Floats::load(head.k + (j + i) * head.k_stride + d) : Floats::zero();
        Floats::transpose(block);
        for (std::size_t i = 0; i < kLanes; ++i) Floats::store(keys + (d + i) * width + j, block[i]);
      }
  }

  // Columns [j, j + kPair) of the scores of kRows queries.
  void score(const float* const (&q)[kRows], std::size_t j) const {
    Floats::Reg sums[kRows][2];
    for (auto& row : sums) row[0] = row[1] = Floats::zero();
    for (std::size_t d = 0; d < head.depth; ++d) {
      const float* const from = keys + d * width + j;
      const Floats::Reg k0 = Floats::load(from), k1 = Floats::load(from + kLanes);
      for (std::size_t r = 0; r < kRows; ++r) {
        const Floats::Reg x = Floats::set1(q[r][d]);
        sums[r][0] = Floats::fma(x, k0, sums[r][0]);
        sums[r][1] = Floats::fma(x, k1, sums[r][1]);
      }
    }
    const Floats::Reg scale = Floats::set1(head.scale);
    for (std::size_t r = 0; r < kRows; ++r)
      for (std::size_t v = 0; v < 2; ++v)
        Floats::store(scores + r * width + j + v * kLanes, Floats::mul(sums[r][v], scale));
  }

  // Adds the mask of a query to its scores; no key is after the last.
  void hide(std::size_t query, float* row) const {
    constexpr float kInfinity = __builtin_inff();
    if (head.kept != nullptr) {
      const std::uint8_t* const kept = head.kept + query * head.mask_stride;
      for (std::size_t j = 0; j < head.keys; ++j) row[j] = kept[j] != 0 ? row[j] : -kInfinity;
    }
    if (head.added != nullptr) {
      const float* const added = head.added + query * head.mask_stride;
      for (std::size_t j = 0; j < head.keys; ++j) row[j] += added[j];
    }
    for (std::size_t j = head.keys; j < width; ++j) row[j] = -kInfinity;
  }

  // Turns the scores of kCount queries into weights e^(score - largest), and gives 1 / their sums; 0 where a
  // query sees no key, whose weights are then 0. Several at once, since each waits for its largest score, for
  // the steps of its exponentials and for its sum.
  template <std::size_t kCount>
  void weigh(float* rows, float* scales) const {
    constexpr float kInfinity = __builtin_inff();
    Floats::Reg most[kCount], sums[kCount];
    for (std::size_t r = 0; r < kCount; ++r) most[r] = Floats::load(rows + r * width);
    for (std::size_t j = kLanes; j < width; j += kLanes)
      for (std::size_t r = 0; r < kCount; ++r)
        most[r] = Floats::max(most[r], Floats::load(rows + r * width + j));
    bool blind[kCount];
    for (std::size_t r = 0; r < kCount; ++r) {
      const float largest = Floats::largest(most[r]);
      blind[r] = largest == -kInfinity && !has_nan(rows + r * width);
      most[r] = Floats::set1(blind[r] ? 0.0f : largest);
      sums[r] = Floats::zero();
    }
    // The exponential ends at e^-87; what is taken away lets it end at 0, and is less than any rounding else.
    const Floats::Reg least = exponential(Floats::set1(-87.0f));
    for (std::size_t j = 0; j < width; j += kLanes)
      for (std::size_t r = 0; r < kCount; ++r) {
        float* const at = rows + r * width + j;
        const Floats::Reg e = Floats::sub(exponential(Floats::sub(Floats::load(at), most[r])), least);
        Floats::store(at, e);
        sums[r] = Floats::add(sums[r], e);
      }
    for (std::size_t r = 0; r < kCount; ++r) scales[r] = blind[r] ? 0.0f : 1.0f / Floats::sum(sums[r]);
  }

  bool has_nan(const float* row) const {
    bool found = false;
    for (std::size_t j = 0; j < head.keys; ++j) found |= row[j] != row[j];
    return found;
  }

  // Columns [c, c + kVectors * kLanes) of the outputs of `here` queries.
  template <std::size_t kVectors>
  void gather(std::size_t first, std::size_t here, const float (&scales)[kRows], std::size_t c) const {
    Floats::Reg sums[kRows][kVectors];
    for (auto& row : sums)
      for (Floats::Reg& sum : row) sum = Floats::zero();
    for (std::size_t j = 0; j < head.keys; ++j) {
      Floats::Reg v[kVectors];
      for (std::size_t i = 0; i < kVectors; ++i)
        v[i] = Floats::load(head.v + j * head.v_stride + c + i * kLanes);
      for (std::size_t r = 0; r < kRows; ++r) {
        const Floats::Reg weight = Floats::set1(scores[r * width + j]);
        for (std::size_t i = 0; i < kVectors; ++i) sums[r][i] = Floats::fma(weight, v[i], sums[r][i]);
      }
    }
    for (std::size_t r = 0; r < here; ++r)
      for (std::size_t i = 0; i < kVectors; ++i)
        Floats::store(head.out + (first + r) * head.out_stride + c + i * kLanes,
                      Floats::mul(sums[r][i], Floats::set1(scales[r])));
  }
};

inline void attend(const AttentionHead& head) { Attention{head}.run(); }

constexpr AttentionKernels kAttentionKernels = {&attend};

}  // namespace
}  // namespace sparsam::SPARSAM_TARGET
