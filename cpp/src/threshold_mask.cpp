// Masks from thresholds: the largest magnitudes are kept, and of those equal to the threshold the first ones.
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <thread>

#include "chunks.hpp"
#include "sources.hpp"
#include "sparsam/isa.hpp"
#include "sparsam/selection.hpp"
#include "table.hpp"

namespace sparsam {
namespace {

// The first ties are kept, so each chunk has to know how many ties came before it. Chunks are claimed in
// order: the previous one is finished, or a running thread works on it.
class TieCounts {
 public:
  explicit TieCounts(std::size_t chunks) : upto_(new std::atomic<std::size_t>[chunks]) {
    for (std::size_t i = 0; i < chunks; ++i) upto_[i].store(kUnknown, std::memory_order_relaxed);
  }

  // Adds the ties of a chunk; returns how many came before it.
  std::size_t add(std::size_t chunk, std::size_t found) {
    std::size_t before = 0;
    if (chunk > 0)
      while ((before = upto_[chunk - 1].load(std::memory_order_acquire)) == kUnknown)
        std::this_thread::yield();
    upto_[chunk].store(before + found, std::memory_order_release);
    return before;
  }

  // Releases those who wait for a chunk that failed.
  void give_up(std::size_t chunk) {
    std::size_t unknown = kUnknown;
    upto_[chunk].compare_exchange_strong(unknown, 0);
  }

 private:
  static constexpr std::size_t kUnknown = std::numeric_limits<std::size_t>::max();
  std::unique_ptr<std::atomic<std::size_t>[]> upto_;
};

template <class Bits>
Kept mask_chunk(const View& array, const Chunk& c, std::size_t chunk, double value, std::size_t ties_kept,
                TieCounts* ties, std::uint64_t* words, const View* out, void* scratch) {
  const auto& kernel = width_kernels<Bits>(kernels());
  Bits* buffer = static_cast<Bits*>(scratch);
  const Bits* src = array.read(c.start, c.size, buffer);
  const Bits t = static_cast<Bits>(key_at_most(value, array.dtype()));
  std::size_t ties_here = 0;
  if (ties != nullptr) {
    const bool exact = key_to_double(t, array.dtype()) == value;
    const std::size_t found = exact ? kernel.count_equal(src, c.size, t) : 0;
    const std::size_t before = ties->add(chunk, found);
    ties_here = before >= ties_kept ? 0 : std::min(found, ties_kept - before);
  }
  Bits* direct = out == nullptr ? nullptr : out->direct<Bits>(c.start);
  Bits* to = out == nullptr ? nullptr : direct != nullptr ? direct : buffer;
  const Kept kept = kernel.threshold_mask(src, c.size, t, ties_here, words + c.start / 64, to);
  if (out != nullptr && direct == nullptr) out->write(c.start, c.size, buffer);
  return kept;
}

}  // namespace

void threshold_mask(Views arrays, double value, std::size_t ties_kept, std::uint64_t* const* words,
                    Views outs, Kept* kept) {
  const std::vector<Chunk> chunks = cut(arrays, kStep);
  std::size_t size = 0, longest = 0;
  bool gathers = false;
  for (const View& v : arrays) {
    size += v.size();
    longest = std::max(longest, std::min(kStep, v.size()));
    gathers |= !v.contiguous();
  }
  for (const View& v : outs) gathers |= !v.contiguous();
  const std::size_t workers = worker_count(chunks.size(), size >= kSerialBelow);
  const Buffers<std::uint64_t> buffers(workers, longest, gathers);
  std::unique_ptr<TieCounts> ties;
  if (ties_kept > 0) ties.reset(new TieCounts(chunks.size()));
  std::vector<Kept> counts(chunks.size());
  const Interrupts interrupts = outs.empty() ? Interrupts::allowed : Interrupts::held;
  for_each_task(chunks.size(), workers, interrupts, [&](std::size_t worker, std::size_t task) {
    const Chunk& c = chunks[task];
    const View* out = outs.empty() ? nullptr : &outs[c.array];
    try {
      with_bits(item_size(arrays[c.array].dtype()), [&](auto width) {
        using Bits = decltype(width);
        counts[task] = mask_chunk<Bits>(arrays[c.array], c, task, value, ties_kept, ties.get(),
                                        words[c.array], out, buffers.of(worker));
      });
    } catch (...) {
      if (ties != nullptr) ties->give_up(task);
      throw;
    }
  });
  std::fill(kept, kept + arrays.size(), Kept{});
  for (std::size_t i = 0; i < chunks.size(); ++i) {
    kept[chunks[i].array].all += counts[i].all;
    kept[chunks[i].array].nonzero += counts[i].nonzero;
  }
}

namespace {

// The fixed cost of a small array, expressed in elements.
constexpr std::size_t kPerArray = 1024;

// Calls body(i) for each array: small ones distributed over threads; large ones in turn, since each uses all
// threads.
template <class Body>
void for_each_array(Views arrays, Body&& body) {
  std::vector<std::size_t> small, large, starts{0};
  std::size_t work = 0, all = 0;
  for (std::size_t i = 0; i < arrays.size(); ++i) {
    if (arrays[i].size() >= kSerialBelow) {
      large.push_back(i);
      continue;
    }
    small.push_back(i);
    work += arrays[i].size() + kPerArray;
    all += arrays[i].size() + kPerArray;
    if (work >= kStep) {
      starts.push_back(small.size());
      work = 0;
    }
  }
  if (starts.back() < small.size()) starts.push_back(small.size());
  const std::size_t tasks = starts.size() - 1;
  for_each_task(tasks, worker_count(tasks, all >= kSerialBelow), [&](std::size_t, std::size_t task) {
    for (std::size_t i = starts[task]; i < starts[task + 1]; ++i) body(small[i]);
  });
  for (const std::size_t i : large) body(i);
}

}  // namespace

bool threshold_masks(Views arrays, const std::vector<std::size_t>& counts, std::uint64_t* const* words,
                     Views outs, Kept* kept) {
  std::atomic<bool> numbers{true};
  for_each_array(arrays, [&](std::size_t i) {
    if (!numbers.load(std::memory_order_relaxed)) return;
    const bool none = counts[i] == 0;
    Threshold t{};
    if (arrays[i].size() > 0) t = threshold(arrays[i], none ? 1 : counts[i]);
    if (std::isnan(t.value)) {
      numbers.store(false);
      return;
    }
    threshold_mask(arrays[i], none ? 0.0 : t.value, none ? arrays[i].size() : t.ties_kept(counts[i]),
                   words + i, outs.empty() ? outs : Views(outs[i]), kept + i);
  });
  return numbers.load();
}

}  // namespace sparsam
