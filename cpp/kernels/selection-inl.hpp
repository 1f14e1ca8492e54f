// Selection kernels, written once over Vec. Include after defining SPARSAM_TARGET and including its
// vec_*.hpp.
//
// Everything has internal linkage: an inline function compiled here for AVX-512 and picked by the linker for
// everybody would crash older machines.
#pragma once
#include "table.hpp"

namespace sparsam::SPARSAM_TARGET {
namespace {

constexpr std::size_t kWord = 64;  // elements per mask word

inline std::size_t popcount(std::uint64_t bits) {
  return static_cast<std::size_t>(__builtin_popcountll(bits));
}

inline std::uint64_t first_bits(std::size_t n) {
  return n >= 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << n) - 1;
}

template <class Bits>
constexpr Bits key_mask() {
  return static_cast<Bits>(static_cast<Bits>(~Bits{0}) >> 1);
}

template <class Bits>
constexpr Bits key_of(Bits bits) {
  return static_cast<Bits>(bits & key_mask<Bits>());
}

// Calls body(keys) for each vector of src[0, n). The lanes past the end hold the largest bit pattern, which
// is below no pivot, so they are never counted.
template <class Bits, class Body>
inline void for_each_vector(const Bits* src, std::size_t n, Body body) {
  using V = Vec<Bits>;
  std::size_t i = 0;
  for (; i + V::kLanes <= n; i += V::kLanes) body(V::key(V::load(src + i)));
  if (i < n) {
    Bits padded[V::kLanes];
    V::store(padded, V::set1(key_mask<Bits>()));
    __builtin_memcpy(padded, src + i, (n - i) * sizeof(Bits));
    body(V::key(V::load(padded)));
  }
}

template <class Bits>
inline std::size_t total(typename Vec<Bits>::Reg counts) {
  Bits lanes[Vec<Bits>::kLanes];
  Vec<Bits>::store(lanes, counts);
  std::size_t sum = 0;
  for (const Bits lane : lanes) sum += lane;
  return sum;
}

template <class Bits>
inline Bits largest_lane(typename Vec<Bits>::Reg keys) {
  Bits lanes[Vec<Bits>::kLanes], largest = 0;
  Vec<Bits>::store(lanes, keys);
  for (const Bits lane : lanes) largest = lane > largest ? lane : largest;
  return largest;
}

// A tally counts in lanes of the element's own width: pieces short enough that 16 bits hold it.
constexpr std::size_t kTallied = std::size_t{1} << 16;
static_assert(kTallied / Vec<std::uint16_t>::kLanes < (std::size_t{1} << 16) &&
                  kBracketLength / Vec<std::uint16_t>::kLanes < (std::size_t{1} << 16),
              "a lane of 16 bits counts at most 65535");
static_assert(kWord % Vec<std::uint16_t>::kLanes == 0 && kWord % Vec<std::uint32_t>::kLanes == 0 &&
                  kWord % Vec<std::uint64_t>::kLanes == 0,
              "a mask word is made of whole vectors");

template <class Bits>
std::size_t count_below(const Bits* src, std::size_t n, Bits t) {
  using V = Vec<Bits>;
  const auto pivot = V::set1(t);
  std::size_t count = 0;
  for (std::size_t i = 0; i < n; i += kTallied) {
    const std::size_t piece = n - i < kTallied ? n - i : kTallied;
    auto even = V::set1(0), odd = V::set1(0);
    std::size_t j = 0;
    for (; j + 2 * V::kLanes <= piece; j += 2 * V::kLanes) {
      even = V::tally(even, V::less(V::key(V::load(src + i + j)), pivot));
      odd = V::tally(odd, V::less(V::key(V::load(src + i + j + V::kLanes)), pivot));
    }
    for_each_vector(src + i + j, piece - j, [&](auto key) { even = V::tally(even, V::less(key, pivot)); });
    count += total<Bits>(V::add(even, odd));
  }
  return count;
}

// Pivots stay below the largest bit pattern, so "<= t" is "< t + 1" without overflow; the same in bracket().
template <class Bits>
std::size_t count_upto(const Bits* src, std::size_t n, Bits t) {
  return count_below(src, n, static_cast<Bits>(t + 1));
}

template <class Bits>
std::size_t count_equal(const Bits* src, std::size_t n, Bits t) {
  return count_upto(src, n, t) - count_below(src, n, t);
}

// Calls word(pointer, count, index) for each run of 64 elements. count < 64 only for the last, which is
// padded with `pad`.
template <class Bits, class Word>
inline void for_each_word(const Bits* src, std::size_t n, Bits pad, Word word) {
  std::size_t i = 0;
  for (; i + kWord <= n; i += kWord) word(src + i, kWord, i / kWord);
  if (i < n) {
    Bits padded[kWord];
    for (Bits& p : padded) p = pad;
    __builtin_memcpy(padded, src + i, (n - i) * sizeof(Bits));
    word(padded, n - i, i / kWord);
  }
}

template <class Bits>
Bits largest_upto(const Bits* src, std::size_t n, Bits t) {
  using V = Vec<Bits>;
  const auto above = V::set1(static_cast<Bits>(t + 1));
  auto largest = V::set1(0);
  for_each_vector(src, n,
                  [&](auto key) { largest = V::max(largest, V::keep(key, V::bits(V::less(key, above)))); });
  return largest_lane<Bits>(largest);
}

template <class Bits>
Bits bisect(const Bits* src, std::size_t n, std::size_t k, std::size_t tolerance, Bits low, Bits high) {
  std::size_t below = 0, upto_high = n;  // keys < low, keys <= high
  while (low < high && upto_high - below > 1) {
    const Bits middle = static_cast<Bits>(low + (high - low) / 2);
    const std::size_t upto = count_upto(src, n, middle);
    if (upto < k) {
      if (upto + tolerance >= k) return middle;
      low = static_cast<Bits>(middle + 1);
      below = upto;
    } else {
      high = middle;
      upto_high = upto;
    }
  }
  return low < high ? largest_upto(src, n, high) : low;  // one key is left, which is the largest up to high
}

// The few keys inside are collected in a second loop over the words that have any; the first notes these
// without a branch. A compressed store per vector, which mostly stores nothing, would cost more than all of
// the comparisons (1.7 against 0.6 ns per 64 bytes on Zen 5). kTies: count keys equal to the pivots too.
// kInside: there may be keys between them.
template <bool kTies, bool kInside, class Bits>
std::size_t bracket_pass(const Bits* src, std::size_t n, Bits low, Bits high, Bits* inside,
                         BracketCounts* counts) {
  using V = Vec<Bits>;
  const auto at_low = V::set1(low), over_low = V::set1(static_cast<Bits>(low + 1));
  const auto at_high = V::set1(high), over_high = V::set1(static_cast<Bits>(high + 1));
  auto below_low = V::set1(0), upto_low = V::set1(0), upto_high = V::set1(0), largest = V::set1(0);
  std::uint64_t hits[kBracketLength / kWord];
  std::uint16_t hit_words[kBracketLength / kWord];
  static_assert(kBracketLength / kWord <= (std::size_t{1} << 16), "hit_words hold 16 bits");
  SPARSAM_CHECK(n <= kBracketLength);
  std::size_t n_hit_words = 0;
  for_each_word(src, n, key_mask<Bits>(), [&](const Bits* p, std::size_t count, std::size_t index) {
    std::uint64_t bits = 0;
    for (std::size_t j = 0; j < kWord; j += V::kLanes) {
      const auto key = V::key(V::load(p + j));
      const auto upto = V::less(key, over_low);
      upto_low = V::tally(upto_low, upto);
      if constexpr (kTies) {
        below_low = V::tally(below_low, V::less(key, at_low));
        upto_high = V::tally(upto_high, V::less(key, over_high));
      }
      if constexpr (kInside) bits |= (V::bits(V::less(key, at_high)) & ~V::bits(upto)) << j;
      if (count == kWord) largest = V::max(largest, key);
    }
    if constexpr (kInside) {
      hits[n_hit_words] = bits;
      hit_words[n_hit_words] = static_cast<std::uint16_t>(index);
      n_hit_words += bits != 0;
    }
    if (count < kWord)
      for (std::size_t j = 0; j < count; ++j)
        if (key_of(p[j]) > counts->largest) counts->largest = key_of(p[j]);
  });
  std::size_t found = 0;
  for (std::size_t i = 0; i < n_hit_words; ++i) {
    const Bits* p = src + hit_words[i] * kWord;
    std::uint64_t bits = hits[i];
    do {
      inside[found++] = key_of(p[__builtin_ctzll(bits)]);
      bits &= bits - 1;
    } while (bits != 0);
  }
  if (largest_lane<Bits>(largest) > counts->largest) counts->largest = largest_lane<Bits>(largest);
  counts->upto_low += total<Bits>(upto_low);
  counts->below_low += total<Bits>(below_low);
  counts->upto_high += total<Bits>(upto_high);
  return found;
}

template <class Bits>
std::size_t bracket(const Bits* src, std::size_t n, Bits low, Bits high, bool ties, Bits* inside,
                    BracketCounts* counts) {
  if (!ties) return bracket_pass<false, true>(src, n, low, high, inside, counts);
  if (high > low + 1) return bracket_pass<true, true>(src, n, low, high, inside, counts);
  return bracket_pass<true, false>(src, n, low, high, inside, counts);
}

// Stores the 64 elements at p with those whose bit is clear as 0; only `count` of them to out.
template <class Bits>
inline void store_kept(const Bits* p, std::size_t count, std::uint64_t bits, Bits* out) {
  using V = Vec<Bits>;
  Bits padded[kWord];
  Bits* to = count == kWord ? out : padded;
  for (std::size_t j = 0; j < kWord; j += V::kLanes) V::store(to + j, V::keep(V::load(p + j), bits >> j));
  if (count < kWord) __builtin_memcpy(out, padded, count * sizeof(Bits));
}

template <class Bits>
Kept threshold_mask(const Bits* src, std::size_t n, Bits t, std::size_t ties_kept, std::uint64_t* words,
                    Bits* out) {
  using V = Vec<Bits>;
  Kept kept;
  const std::size_t ties_wanted = ties_kept;
  const auto pivot = V::set1(t), above = V::set1(static_cast<Bits>(t + 1));
  for_each_word(src, n, Bits{0}, [&](const Bits* p, std::size_t count, std::size_t index) {
    std::uint64_t upto = 0, below = 0;
    for (std::size_t j = 0; j < kWord; j += V::kLanes) {
      const auto key = V::key(V::load(p + j));
      upto |= V::bits(V::less(key, above)) << j;
      below |= V::bits(V::less(key, pivot)) << j;
    }
    const std::uint64_t valid = first_bits(count);
    std::uint64_t keep = ~upto & valid;
    std::uint64_t ties = upto & ~below & valid;
    if (ties != 0 && ties_kept != 0) {
      const std::size_t here = popcount(ties);
      if (here <= ties_kept) {
        keep |= ties;
        ties_kept -= here;
      } else {
        for (; ties_kept != 0; --ties_kept, ties &= ties - 1) keep |= ties & (0 - ties);
      }
    }
    kept.all += popcount(keep);
    words[index] = keep;
    if (out != nullptr) store_kept(p, count, keep, out + index * kWord);
  });
  kept.nonzero = t == 0 ? kept.all - (ties_wanted - ties_kept) : kept.all;  // ties with 0 are zeros
  return kept;
}

template <class Bits>
std::size_t apply(const Bits* src, std::size_t n, const std::uint64_t* words, Bits* out) {
  using V = Vec<Bits>;
  const auto zero = V::set1(0);
  std::size_t nonzero = 0;
  for_each_word(src, n, Bits{0}, [&](const Bits* p, std::size_t count, std::size_t index) {
    const std::uint64_t keep = words[index];
    std::uint64_t numbers = 0;
    for (std::size_t j = 0; j < kWord; j += V::kLanes)
      numbers |= V::bits(V::less(zero, V::key(V::load(p + j)))) << j;
    nonzero += popcount(numbers & keep);
    store_kept(p, count, keep, out + index * kWord);
  });
  return nonzero;
}

// Bit i of the result is byte i (0 or 1).
inline std::uint64_t pack_flags(const std::uint8_t* flags) {
  std::uint64_t word = 0;
  for (std::size_t i = 0; i < 8; ++i) {
    std::uint64_t eight;
    __builtin_memcpy(&eight, flags + 8 * i, 8);
    word |= ((eight * 0x0102040810204080) >> 56) << (8 * i);
  }
  return word;
}

// One group per lane, so that the m * m comparisons are straight vector code: element i survives when fewer
// than `keep` others beat it; a lower index beats at equal keys.
template <class Bits>
Bits nm_mask(const Bits* src, std::size_t n, std::size_t keep, std::size_t m, std::uint64_t* words) {
  constexpr std::size_t kGroups = 64 / sizeof(Bits);
  SPARSAM_CHECK(m >= 1 && m <= kLargestGroup && n % m == 0);
  Bits key[kLargestGroup][kGroups];
  std::uint8_t flags[kWord * kLargestGroup];
  Bits largest = 0;
  for (std::size_t batch = 0; batch < n; batch += kWord * m) {  // 64 groups: m whole words
    const std::size_t elements = n - batch < kWord * m ? n - batch : kWord * m;
    __builtin_memset(flags, 0, kWord * m);
    for (std::size_t first = 0; first < elements; first += kGroups * m) {
      const std::size_t left = (elements - first) / m;
      const std::size_t groups = left < kGroups ? left : kGroups;
      const Bits* p = src + batch + first;
      for (std::size_t i = 0; i < m; ++i) {
        for (std::size_t g = 0; g < groups; ++g) {
          key[i][g] = key_of(p[g * m + i]);
          largest = key[i][g] > largest ? key[i][g] : largest;
        }
        for (std::size_t g = groups; g < kGroups; ++g) key[i][g] = 0;
      }
      for (std::size_t i = 0; i < m; ++i) {
        Bits beaten[kGroups] = {};
        for (std::size_t j = 0; j < i; ++j)
          for (std::size_t g = 0; g < kGroups; ++g)
            beaten[g] = static_cast<Bits>(beaten[g] + (key[j][g] >= key[i][g]));
        for (std::size_t j = i + 1; j < m; ++j)
          for (std::size_t g = 0; g < kGroups; ++g)
            beaten[g] = static_cast<Bits>(beaten[g] + (key[j][g] > key[i][g]));
        for (std::size_t g = 0; g < groups; ++g) flags[first + g * m + i] = beaten[g] < keep;
      }
    }
    for (std::size_t i = 0; i < elements; i += kWord) words[(batch + i) / kWord] = pack_flags(flags + i);
  }
  return largest;
}

template <class Bits>
constexpr WidthKernels<Bits> kSelectionKernels = {
    &count_upto<Bits>,     &count_equal<Bits>, &bisect<Bits>,  &bracket<Bits>,
    &threshold_mask<Bits>, &apply<Bits>,       &nm_mask<Bits>,
};

}  // namespace
}  // namespace sparsam::SPARSAM_TARGET
