// The kernels that an instruction set provides. A kernel is added by a field here and in the rows.
#pragma once
#include <cstddef>
#include <cstdint>

#include "attention.hpp"
#include "int8.hpp"
#include "matmul.hpp"
#include "moments.hpp"
#include "reconstruction.hpp"
#include "recurrent.hpp"
#include "sparsam/check.hpp"
#include "sparsam/kept.hpp"
#include "steps.hpp"

namespace sparsam {

// Bits of KernelTable::required and Int8Kernels::required. avx512 means F, BW, DQ, VL and CD, as on Skylake-X
// and everything after it; vnni the VNNI, VBMI and VBMI2 of AVX-512, as on Ice Lake and Zen 4; dot the dot
// products of bytes of AArch64, as on Cortex-A76, Neoverse and Apple's; avx_vnni VNNI in 256 bits, as on
// Alder Lake, Zen 5 and their like.
enum Feature : std::uint32_t {
  kNone = 0,
  kAvx2 = 1,
  kAvx512 = 2,
  kVnni = 4,
  kDot = 8,
  kAvxVnni = 16,
  kNeon = 32
};

// The longest piece that one call of WidthKernels::bracket takes: an L1 cache's worth of float64.
constexpr std::size_t kBracketLength = 4096;
// The largest m of WidthKernels::nm_mask.
constexpr std::size_t kLargestGroup = 256;

// The counts of one pass over a piece of data against two pivots low <= high.
struct BracketCounts {
  std::size_t upto_low = 0;                  // keys <= low
  std::size_t below_low = 0, upto_high = 0;  // keys < low and keys <= high; only where ties were asked for
  std::uint64_t largest = 0;                 // largest key
};

// Kernels over numbers of one width. `src` holds raw bits: the sign is ignored everywhere. Nothing is
// allocated; no alignment is needed. Mask words hold element i in bit i % 64 of word i / 64; bits past n in
// the last word become 0.
template <class Bits>
struct WidthKernels {
  // Keys in src[0, n) that are <= t, and that are t; t is below the largest bit pattern.
  std::size_t (*count_upto)(const Bits* src, std::size_t n, Bits t);
  std::size_t (*count_equal)(const Bits* src, std::size_t n, Bits t);
  // For src[0, n) with all keys in [low, high]: a key with k - tolerance to k - 1 keys up to it, if bisection
  // meets one; otherwise the k-th smallest key. n <= 2^32; high is below the largest bit pattern.
  Bits (*bisect)(const Bits* src, std::size_t n, std::size_t k, std::size_t tolerance, Bits low, Bits high);
  // Adds to *counts, and writes the keys strictly between low and high to inside (room for n). Returns how
  // many. n <= kBracketLength; high is below the largest bit pattern.
  std::size_t (*bracket)(const Bits* src, std::size_t n, Bits low, Bits high, bool ties, Bits* inside,
                         BracketCounts* counts);
  // Keeps keys > t and the first ties_kept of the keys == t; writes n bits, and to out (unless null; may be
  // src) the elements with the pruned ones as +0.
  Kept (*threshold_mask)(const Bits* src, std::size_t n, Bits t, std::size_t ties_kept, std::uint64_t* words,
                         Bits* out);
  // Elements whose bit is set, and +0 elsewhere. out may be src. Returns how many are kept and not zero.
  std::size_t (*apply)(const Bits* src, std::size_t n, const std::uint64_t* words, Bits* out);
  // Of every m consecutive elements (m <= kLargestGroup, m divides n) the `keep` largest, ties to the lower
  // index; writes n bits. Returns the largest key.
  Bits (*nm_mask)(const Bits* src, std::size_t n, std::size_t keep, std::size_t m, std::uint64_t* words);
};

struct KernelTable {
  const char* name;
  const char* description;
  std::uint32_t required;
  WidthKernels<std::uint16_t> w16;
  WidthKernels<std::uint32_t> w32;
  WidthKernels<std::uint64_t> w64;
  MatmulKernels matmul;
  ReconstructionKernels reconstruction;
  MomentKernels moments;
  RecurrentKernels recurrent;
  AttentionKernels attention;
  StepKernels steps;
};

template <class Bits>
constexpr const WidthKernels<Bits>& width_kernels(const KernelTable& table) {
  if constexpr (sizeof(Bits) == 2)
    return table.w16;
  else if constexpr (sizeof(Bits) == 4)
    return table.w32;
  else
    return table.w64;
}

}  // namespace sparsam
