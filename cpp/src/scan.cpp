// Scans for single values: where a NaN is, and how many values are not zero.
#include <atomic>
#include <limits>

#include "sources.hpp"
#include "sparsam/isa.hpp"
#include "sparsam/selection.hpp"
#include "table.hpp"

namespace sparsam {

Position find_nan(const std::vector<View>& arrays) {
  constexpr std::size_t kNowhere = std::numeric_limits<std::size_t>::max();
  for (std::size_t a = 0; a < arrays.size(); ++a) {
    const View& v = arrays[a];
    const std::vector<Chunk> chunks = cut(v, kStep);
    const std::size_t workers = worker_count(chunks.size(), v.size() >= kSerialBelow);
    std::atomic<std::size_t> first{kNowhere};
    with_bits(item_size(v.dtype()), [&](auto width) {
      using Bits = decltype(width);
      const auto infinity = static_cast<Bits>(infinity_key(v.dtype()));
      const Buffers<Bits> buffers(workers, kStep, !v.contiguous());
      for_each_task(chunks.size(), workers, [&](std::size_t worker, std::size_t task) {
        const Chunk& c = chunks[task];
        const Bits* src = v.read(c.start, c.size, buffers.of(worker));
        if (width_kernels<Bits>(kernels()).count_upto(src, c.size, infinity) == c.size) return;
        std::size_t i = 0;
        while (i < c.size && key_of(src[i]) <= infinity) ++i;
        if (i == c.size) return;  // another thread has overwritten it since it was counted
        std::size_t seen = first.load();
        while (c.start + i < seen && !first.compare_exchange_weak(seen, c.start + i)) {
        }
      });
    });
    if (first.load() != std::numeric_limits<std::size_t>::max()) return {a, first.load(), true};
  }
  return {0, 0, false};
}

std::size_t count_nonzero(const View& array) {
  const View v = array.in_memory_order();
  const std::vector<Chunk> chunks = cut(v, kStep);
  const std::size_t workers = worker_count(chunks.size(), v.size() >= kSerialBelow);
  std::atomic<std::size_t> zeros{0};
  with_bits(item_size(v.dtype()), [&](auto width) {
    using Bits = decltype(width);
    const Buffers<Bits> buffers(workers, kStep, !v.contiguous());
    for_each_task(chunks.size(), workers, [&](std::size_t worker, std::size_t task) {
      const Chunk& c = chunks[task];
      const Bits* src = v.read(c.start, c.size, buffers.of(worker));
      zeros.fetch_add(width_kernels<Bits>(kernels()).count_upto(src, c.size, 0), std::memory_order_relaxed);
    });
  });
  return v.size() - zeros.load();
}

}  // namespace sparsam
