#include "sparsam/memory.hpp"

#include <cstdint>
#include <cstdlib>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace sparsam {

namespace {

constexpr std::size_t kHugePage = std::size_t{1} << 21;

#ifdef __linux__

// Mapped directly, so that freed memory returns to the system: a heap may keep it. Only whole huge pages are
// requested; a partly used one would take memory that `nbytes` does not count.
char* map(std::size_t bytes) {
  const std::size_t room = bytes + kHugePage;
  void* const all = mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (all == MAP_FAILED) throw std::bad_alloc();
  char* const begin = static_cast<char*>(all);
  const std::size_t before = -reinterpret_cast<std::uintptr_t>(all) % kHugePage;
  const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  const std::size_t end = (before + bytes + page - 1) / page * page, whole = bytes / kHugePage * kHugePage;
  if (before > 0) munmap(begin, before);
  if (room > end) munmap(begin + end, room - end);
  if (whole > 0) madvise(begin + before, whole, MADV_HUGEPAGE);
  return begin + before;
}

#endif

}  // namespace

Memory::Memory(std::size_t bytes) : data_(nullptr, Free{0}), bytes_(bytes) {
#ifdef __linux__
  if (bytes >= kHugePage / 2) {
    data_ = {map(bytes), Free{bytes}};
    return;
  }
#endif
  constexpr std::size_t kLine = 64;
  void* data = nullptr;
  if (posix_memalign(&data, kLine, bytes == 0 ? kLine : bytes) != 0) throw std::bad_alloc();
  data_.reset(static_cast<char*>(data));
}

void Memory::Free::operator()(char* p) const {
#ifdef __linux__
  if (mapped > 0) {
    munmap(p, mapped);
    return;
  }
#endif
  std::free(p);
}

}  // namespace sparsam
