#include "sparsam/memory.hpp"

#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace sparsam {

Memory::Memory(std::size_t bytes) : bytes_(bytes) {
  constexpr std::size_t kLine = 64, kHugePage = std::size_t{1} << 21;
  const std::size_t align = bytes >= kHugePage ? kHugePage : kLine;
  void* data = nullptr;
  if (posix_memalign(&data, align, bytes == 0 ? kLine : bytes) != 0) throw std::bad_alloc();
  data_.reset(static_cast<char*>(data));
#ifdef MADV_HUGEPAGE
  // Only a wish, and for whole pages: one that is half used would take memory that nobody counts.
  if (align == kHugePage) madvise(data, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
}

}  // namespace sparsam
