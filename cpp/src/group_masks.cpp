// Masks from comparisons within small groups: N of every M, and the largest of each row.
#include <atomic>
#include <numeric>

#include "order_statistic.hpp"
#include "sparsam/selection.hpp"

namespace sparsam {

bool nm_mask(const View& array, std::size_t keep, std::size_t m, std::uint64_t* words) {
  const std::size_t step = 64 * m * std::max<std::size_t>(1, kStep / (64 * m));
  const std::vector<Chunk> chunks = cut(array, step);
  const std::size_t workers = worker_count(chunks.size(), array.size() >= kSerialBelow);
  return with_bits(item_size(array.dtype()), [&](auto width) {
    using Bits = decltype(width);
    const auto& kernel = width_kernels<Bits>(kernels());
    const auto infinity = static_cast<Bits>(infinity_key(array.dtype()));
    std::atomic<bool> numbers{true};
    const Buffers<Bits> buffers(workers, std::min(step, array.size()), !array.contiguous());
    for_each_task(chunks.size(), workers, [&](std::size_t worker, std::size_t task) {
      const Chunk& c = chunks[task];
      const Bits* src = array.read(c.start, c.size, buffers.of(worker));
      if (kernel.nm_mask(src, c.size, keep, m, words + c.start / 64) > infinity) numbers.store(false);
    });
    return numbers.load();
  });
}

namespace {

// Up to this length, bisection over the bits of a row, which is in the L1 cache, is faster than a sample and
// a pass. Measured crossings, AVX2 and AVX-512: beyond 8192 for 16 bits; 2500 and 8192 for 32; 1024 and 2500
// for 64.
template <class Bits>
constexpr std::size_t kDirectRow = sizeof(Bits) == 2   ? 8192
                                   : sizeof(Bits) == 4 ? 3072
                                                       : 1024;

// Stores n bits at bit `start` of words that are 0 from there on; bits past n in `bits` are 0.
void store_bits(const std::uint64_t* bits, std::size_t n, std::uint64_t* words, std::size_t start) {
  const std::size_t shift = start % 64;
  std::uint64_t* to = words + start / 64;
  for (std::size_t i = 0; i < (n + 63) / 64; ++i) {
    to[i] |= bits[i] << shift;
    if (shift + std::min<std::size_t>(64, n - 64 * i) > 64) to[i + 1] |= bits[i] >> (64 - shift);
  }
}

}  // namespace

bool row_topk_mask(const View& array, std::size_t cols, std::size_t pruned, std::uint64_t* words) {
  // Tasks of whole rows that share no mask word, about as large as chunks in other passes.
  const std::size_t unit = cols * (64 / std::gcd(cols, std::size_t{64}));
  const std::vector<Chunk> chunks = cut(array, unit * std::max<std::size_t>(1, kStep / unit));
  const std::size_t workers = worker_count(chunks.size(), array.size() >= kSerialBelow);
  const std::size_t row_words = (cols + 63) / 64;
  return with_bits(item_size(array.dtype()), [&](auto width) {
    using Bits = decltype(width);
    const auto& kernel = width_kernels<Bits>(kernels());
    const auto infinity = static_cast<Bits>(infinity_key(array.dtype()));
    const std::size_t budget = std::max(kScratchFloor / sizeof(Bits), cols);
    const Buffers<Bits> buffers(workers, cols, !array.contiguous());
    const Buffers<std::uint64_t> rows(workers, row_words, true);
    std::atomic<bool> numbers{true};
    for_each_task(chunks.size(), workers, [&](std::size_t worker, std::size_t task) {
      const Chunk& c = chunks[task];
      std::uint64_t* to = words + c.start / 64;
      std::fill(to, to + (c.size + 63) / 64, 0);
      for (std::size_t start = 0; start < c.size && numbers.load(std::memory_order_relaxed); start += cols) {
        const Bits* src = array.read(c.start + start, cols, buffers.of(worker));
        const Ranked<Bits> r =
            cols <= kDirectRow<Bits>
                ? select_directly(src, cols, pruned, Bits{0}, infinity, infinity)
                : select(ContiguousSource<Bits>{src, cols}, pruned, Bits{0}, infinity, infinity, budget);
        if (r.nan) numbers.store(false);
        kernel.threshold_mask(src, cols, r.key, r.ties_kept(pruned), rows.of(worker), nullptr);
        store_bits(rows.of(worker), cols, to, start);
      }
    });
    return numbers.load();
  });
}

}  // namespace sparsam
