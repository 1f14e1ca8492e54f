#include "sparsam/memory.hpp"

#include <cstring>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace sparsam {

Memory::Memory(std::size_t bytes) : bytes_(bytes) {
  constexpr std::size_t kLine = 64, kHugePage = std::size_t{1} << 21;
  const std::size_t align = bytes >= 2 * kHugePage ? kHugePage : kLine;
  const std::size_t rounded = (bytes + align - 1) / align * align;
  data_.reset(static_cast<char*>(std::aligned_alloc(align, rounded == 0 ? align : rounded)));
  if (data_ == nullptr) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  if (align == kHugePage) madvise(data_.get(), rounded, MADV_HUGEPAGE);  // only a wish
#endif
}

Memory Memory::readable_past(std::size_t bytes) {
  Memory memory(bytes + kReadable);
  std::memset(memory.as<char>() + bytes, 0, kReadable);
  return memory;
}

}  // namespace sparsam
