// Tasks that threads claim from their own range first, and then from the ranges of others: in each call a
// thread reads mostly the same data, which may still be in its cache.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstddef>

#include "sparsam/threads.hpp"

namespace sparsam {

// A number for the calling thread, the same in all calls; threads that started together have consecutive
// ones.
inline std::size_t thread_number() {
  static std::atomic<std::size_t> threads{0};
  static thread_local const std::size_t mine = threads.fetch_add(1, std::memory_order_relaxed);
  return mine;
}

// Calls body(task) once for each task in [0, tasks), in no order. Exceptions and interrupts are noticed only
// when a thread has finished, so use it for short work such as one pass over a weight.
template <class Body>
void for_each_in_ranges(std::size_t tasks, std::size_t workers, Body&& body) {
  constexpr std::size_t kMaxRanges = 64;
  struct alignas(64) Range {
    std::atomic<std::size_t> next;
    std::size_t end;
  };
  const std::size_t n = std::min(workers, kMaxRanges);
  if (n <= 1) {
    for_each_task(tasks, 1, [&](std::size_t, std::size_t task) { body(task); });
    return;
  }
  Range ranges[kMaxRanges];
  for (std::size_t r = 0; r < n; ++r) {
    ranges[r].next.store(tasks * r / n, std::memory_order_relaxed);
    ranges[r].end = tasks * (r + 1) / n;
  }
  for_each_task(n, n, [&](std::size_t, std::size_t) {
    const std::size_t own = thread_number();
    for (std::size_t i = 0; i < n; ++i) {
      Range& range = ranges[(own + i) % n];
      for (;;) {
        const std::size_t task = range.next.fetch_add(1, std::memory_order_relaxed);
        if (task >= range.end) break;
        body(task);
      }
    }
  });
}

}  // namespace sparsam
