#include "sparsam/masks.hpp"

#include <atomic>

#include "chunks.hpp"
#include "sparsam/isa.hpp"
#include "table.hpp"

namespace sparsam {
namespace {
constexpr std::size_t kMaskStep = std::size_t{1} << 16;
}

std::size_t count_bits(const std::uint64_t* words, std::size_t n_words) {
  std::size_t count = 0;
  for (std::size_t i = 0; i < n_words; ++i) count += static_cast<std::size_t>(__builtin_popcountll(words[i]));
  return count;
}

std::size_t apply_mask(const View& array, const std::uint64_t* words, const View& out) {
  const std::vector<Chunk> chunks = cut(array, kMaskStep);
  const std::size_t workers = worker_count(chunks.size(), array.size() >= kSerialBelow);
  std::atomic<std::size_t> nonzero{0};
  with_bits(item_size(array.dtype()), [&](auto width) {
    using Bits = decltype(width);
    const auto& kernel = width_kernels<Bits>(kernels());
    const Buffers<Bits> buffers(workers, std::min(kMaskStep, array.size()),
                                !array.contiguous() || !out.contiguous());
    for_each_task(chunks.size(), workers, Interrupts::held, [&](std::size_t worker, std::size_t task) {
      const Chunk& c = chunks[task];
      Bits* buffer = buffers.of(worker);
      const Bits* src = array.read(c.start, c.size, buffer);
      Bits* direct = out.direct<Bits>(c.start);
      Bits* to = direct != nullptr ? direct : buffer;
      nonzero.fetch_add(kernel.apply(src, c.size, words + c.start / 64, to), std::memory_order_relaxed);
      if (direct == nullptr) out.write(c.start, c.size, buffer);
    });
  });
  return nonzero.load();
}

}  // namespace sparsam
