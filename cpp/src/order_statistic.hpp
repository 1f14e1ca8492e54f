// The k-th smallest key of a source in about one read of it: a sample gives two pivots that very likely
// enclose it, one parallel pass counts against them and collects the few keys between, and these are searched
// in the same way. After Floyd and Rivest, "Expected time bounds for selection" (1975). A pass whose pivots
// missed still narrows the range, by half of the remaining keys at least from the fourth on, so the search
// always ends; the answer is exact whatever the sample was.
//
// Another thread may write to the data during the search. The answer is then meaningless, but every loop
// ends: counts that contradict those before them stop the search, and the last pivot is counted once more.
#pragma once
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>

#include "sources.hpp"
#include "sparsam/isa.hpp"
#include "table.hpp"

namespace sparsam {

// Up to this size, bisect over the bits.
constexpr std::size_t kDirect = 512;
// Beyond this, the random reads of a larger sample cost more than its narrower bracket saves.
constexpr std::size_t kMaxSampled = std::size_t{1} << 16;
// Half width of the bracket, where memory allows: it misses about once in 100 calls.
constexpr double kDeviations = 2.6;
// Scratch memory: this share of the data, or this many bytes if that is more.
constexpr double kScratchShare = 0.05;
constexpr std::size_t kScratchFloor = std::size_t{1} << 17;

template <class Bits>
constexpr std::size_t kRun = 64 / sizeof(Bits);  // sampled elements that lie together: a cache line

template <class Bits>
struct Ranked {
  Bits key;
  std::size_t below, equal;
  bool nan;

  // How many of those equal to the key are kept so that k are pruned.
  std::size_t ties_kept(std::size_t k) const {
    return k <= below ? equal : equal - std::min(equal, k - below);
  }
};

// Varies the sampled positions inside their strata, so that periodic data is not always sampled at the same
// phase.
inline std::uint64_t scramble(std::uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

// Fills keys with about m elements (room for m + kRun) from jittered places, one run in each of m /
// kRun<Bits> equal strata.
template <class Bits, class Source>
std::size_t sample(const Source& source, std::size_t m, std::uint64_t seed, Bits* keys) {
  const std::size_t runs = m / kRun<Bits>;
  const double stratum = static_cast<double>(source.size) / static_cast<double>(runs);
  std::size_t chunk = 0, filled = 0;
  for (std::size_t r = 0; r < runs; ++r) {
    const double jitter = static_cast<double>(scramble(seed + r + 1) >> 11) * 0x1p-53;
    const auto at =
        std::min(static_cast<std::size_t>((static_cast<double>(r) + jitter) * stratum), source.size - 1);
    while (chunk + 1 < source.chunks() && source.offset(chunk + 1) <= at) ++chunk;
    const std::size_t chunk_size = source.chunk_size(chunk), n = std::min(kRun<Bits>, chunk_size);
    const std::size_t skip = std::min((at - source.offset(chunk)) & ~(kRun<Bits> - 1), chunk_size - n);
    const Bits* p = source.read(chunk, skip, n, keys + filled);
    if (p != keys + filled) std::copy(p, p + n, keys + filled);
    filled += n;
  }
  return filled;
}

struct Pass {
  BracketCounts counts;
  std::size_t inside;
};

// Counts the whole source against the pivots; collects the keys between them, at most `room`.
template <class Bits, class Source>
Pass run_pass(const Source& source, Bits low, Bits high, bool ties, Bits* collected, std::size_t room) {
  const auto& kernel = width_kernels<Bits>(kernels());
  const std::size_t workers = worker_count(source.chunks(), source.size >= kSerialBelow);
  std::atomic<std::size_t> upto_low{0}, below_low{0}, upto_high{0}, inside{0};
  std::atomic<std::uint64_t> largest{0};
  const Buffers<Bits> buffers(workers, kBracketLength, source.gathers);
  for_each_task(source.chunks(), workers, [&](std::size_t worker, std::size_t task) {
    BracketCounts counts;
    Bits found[kBracketLength];
    for (std::size_t skip = 0; skip < source.chunk_size(task); skip += kBracketLength) {
      const std::size_t n = std::min(kBracketLength, source.chunk_size(task) - skip);
      const Bits* src = source.read(task, skip, n, buffers.of(worker));
      const std::size_t hits = kernel.bracket(src, n, low, high, ties, found, &counts);
      if (hits == 0) continue;
      const std::size_t at = inside.fetch_add(hits, std::memory_order_relaxed);
      if (at + hits <= room) std::copy(found, found + hits, collected + at);
    }
    upto_low.fetch_add(counts.upto_low, std::memory_order_relaxed);
    below_low.fetch_add(counts.below_low, std::memory_order_relaxed);
    upto_high.fetch_add(counts.upto_high, std::memory_order_relaxed);
    std::uint64_t seen = largest.load(std::memory_order_relaxed);
    while (seen < counts.largest && !largest.compare_exchange_weak(seen, counts.largest)) {
    }
  });
  return {{upto_low, below_low, upto_high, largest}, inside};
}

template <class Bits>
Ranked<Bits> select_directly(const Bits* data, std::size_t n, std::size_t k, Bits least, Bits most,
                             Bits infinity) {
  const auto& kernel = width_kernels<Bits>(kernels());
  if (kernel.count_upto(data, n, infinity) != n) return {0, 0, 0, true};
  const Bits key = kernel.bisect(data, n, k, 0, least, most);
  const std::size_t equal = kernel.count_equal(data, n, key);
  const std::size_t upto = kernel.count_upto(data, n, key);
  return {key, upto - std::min(upto, equal), equal, false};
}

template <class Bits, class Source>
Ranked<Bits> gather_and_select(const Source& source, std::size_t k, Bits least, Bits most, Bits infinity) {
  Bits data[kDirect];
  std::size_t n = 0;
  for (std::size_t c = 0; c < source.chunks(); ++c) {
    const std::size_t size = source.chunk_size(c);
    const Bits* p = source.read(c, 0, size, data + n);
    if (p != data + n) std::copy(p, p + size, data + n);
    n += size;
  }
  return select_directly(data, n, k, least, most, infinity);
}

// How `budget` elements of scratch are used for n elements. A bracket of d deviations on either side of a
// rank encloses about 1.15 d n / sqrt(sampled) keys at most (the median is the worst case; the pivots may lie
// a tenth wide of it).
struct SamplePlan {
  std::size_t sampled, room;
  double deviations;

  SamplePlan(std::size_t n, std::size_t budget) {
    const double size = static_cast<double>(n);
    sampled = std::min({kMaxSampled, static_cast<std::size_t>(std::cbrt(size * size)), budget / 4});
    const double enclosed = 1.15 * size / std::sqrt(static_cast<double>(sampled) + 1);
    room = std::min({n, budget * 7 / 10, static_cast<std::size_t>(1.15 * kDeviations * enclosed) + 64});
    deviations = std::min(kDeviations, static_cast<double>(room) / (1.15 * enclosed));
  }
};

// Counts one key in the source as it is now.
template <class Bits, class Source>
Ranked<Bits> count_once_more(const Source& source, Bits key, Bits infinity) {
  const Pass pass = run_pass(source, key, key, true, static_cast<Bits*>(nullptr), 0);
  return {key, pass.counts.below_low, pass.counts.upto_low - pass.counts.below_low,
          pass.counts.largest > infinity};
}

// The k-th smallest key, known to lie in [least, most]. NaNs, the keys above infinity, are only reported.
// Uses at most `budget` elements of memory.
template <class Bits, class Source>
Ranked<Bits> select(const Source& source, std::size_t k, Bits least, Bits most, Bits infinity,
                    std::size_t budget) {
  const std::size_t n = source.size;
  if (n <= kDirect) return gather_and_select(source, k, least, most, infinity);
  const auto& kernel = width_kernels<Bits>(kernels());
  const SamplePlan plan(n, budget);
  const std::unique_ptr<Bits[]> collected(new Bits[plan.room]);
  std::unique_ptr<Bits[]> keys(new Bits[plan.sampled + kRun<Bits>]);

  // `before` keys are below least, `upto` are at most `most`.
  std::size_t before = 0, upto = n;
  double width = plan.deviations;
  for (std::size_t attempt = 0;; ++attempt) {
    Bits low = static_cast<Bits>(least + (most - least) / 2), high = low;
    bool ties = true;
    if (attempt < 4) {
      std::size_t count = sample(source, plan.sampled, attempt << 40, keys.get());
      const auto outside = [&](Bits bits) { return key_of(bits) < least || key_of(bits) > most; };
      if (attempt > 0)
        count =
            static_cast<std::size_t>(std::remove_if(keys.get(), keys.get() + count, outside) - keys.get());
      if (count > 0) {
        const double p = static_cast<double>(k - before) / static_cast<double>(upto - before),
                     c = static_cast<double>(count);
        const double margin = width * (std::sqrt(c * p * (1 - p)) + 1);
        const double first = std::floor(p * c - margin), last = std::ceil(p * c + margin);
        const bool exact = attempt > 0 || sizeof(Bits) == 2;
        const auto tolerance = exact ? 0 : static_cast<std::size_t>(margin / 5);
        low = first < 1
                  ? least
                  : kernel.bisect(keys.get(), count, static_cast<std::size_t>(first), tolerance, least, most);
        high = last >= c ? most
                         : kernel.bisect(keys.get(), count, static_cast<std::size_t>(last) + tolerance,
                                         tolerance, least, most);
        // Ties at a pivot show in the sample as a repeated key; without them two comparisons fewer are
        // enough.
        const auto repeated = [&](Bits pivot) { return kernel.count_equal(keys.get(), count, pivot) > 1; };
        ties = attempt > 0 || low == high || repeated(low) || repeated(high);
      }
    }
    const Pass pass = run_pass(source, low, high, ties, collected.get(), plan.room);
    if (pass.counts.largest > infinity) return {0, 0, 0, true};
    const std::size_t upto_low = pass.counts.upto_low, below_high = upto_low + pass.inside;
    const std::size_t below_low = pass.counts.below_low, upto_high = pass.counts.upto_high;
    if (k > upto_low && k <= below_high && pass.inside <= plan.room) {
      keys.reset();
      const std::size_t left = budget - plan.room;
      const auto above = static_cast<Bits>(low + 1), below = static_cast<Bits>(high - 1);
      // If too little memory is left for another pass, bisect, which needs none.
      Ranked<Bits> r =
          SamplePlan(pass.inside, left).deviations < 1
              ? select_directly(collected.get(), pass.inside, k - upto_low, above, below, infinity)
              : select(ContiguousSource<Bits>{collected.get(), pass.inside}, k - upto_low, above, below,
                       infinity, left);
      r.below += upto_low;
      return r;
    }
    if (ties && k > below_low && k <= upto_low) return {low, below_low, upto_low - below_low, false};
    if (ties && low < high && k > below_high && k <= upto_high)
      return {high, below_high, upto_high - below_high, false};
    // Unchanged data cannot give these counts: another thread writes to it. Stop narrowing.
    const bool beyond =
        upto_low < before || below_high > upto || (ties && (below_low < before || upto_high > upto));
    const bool empty = k <= upto_low ? ties && low == least : k > below_high && ties && high == most;
    if (beyond || empty) return count_once_more(source, k <= upto_low ? low : high, infinity);
    // The pivots missed, or met ties that were not counted, or too many keys lay between: continue in the
    // part that holds the answer.
    if (k <= upto_low) {
      most = ties ? static_cast<Bits>(low - 1) : low;
      upto = ties ? below_low : upto_low;
    } else if (k <= below_high) {
      least = static_cast<Bits>(low + 1);
      most = static_cast<Bits>(high - 1);
      before = upto_low;
      upto = below_high;
      continue;  // the sample was right, so the next bracket need not be wider
    } else {
      least = ties ? static_cast<Bits>(high + 1) : high;
      before = ties ? upto_high : below_high;
    }
    width *= 4;
  }
}

}  // namespace sparsam
