#include "sparsam/memory.hpp"

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace sparsam {
namespace {

constexpr std::size_t kLine = 64, kHugePage = std::size_t{1} << 21;
constexpr std::size_t kSmall = std::size_t{1} << 16;  // from here on, huge pages are worth it
constexpr std::size_t kShared = 2 * kHugePage;        // pages that small blocks share, at a time

std::shared_ptr<char> allocate(std::size_t bytes, std::size_t align) {
  const std::size_t rounded = (bytes + align - 1) / align * align;
  std::shared_ptr<char> data(static_cast<char*>(std::aligned_alloc(align, rounded == 0 ? align : rounded)),
                             std::free);
  if (data == nullptr) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  if (align == kHugePage) madvise(data.get(), rounded, MADV_HUGEPAGE);  // only a wish
#endif
  return data;
}

// Pages that blocks are cut from, one after the other; every block keeps them alive.
std::shared_ptr<char> cut(std::size_t bytes) {
  static std::mutex mutex;
  static std::weak_ptr<char> last;
  static std::size_t used = 0;
  const std::lock_guard<std::mutex> lock(mutex);
  std::shared_ptr<char> pages = last.lock();
  if (pages == nullptr || kShared - used < bytes) {
    pages = allocate(kShared, kHugePage);
    last = pages;
    used = 0;
  }
  std::shared_ptr<char> block(pages, pages.get() + used);
  used += (bytes + kLine - 1) / kLine * kLine;
  return block;
}

}  // namespace

Memory::Memory(std::size_t bytes) : bytes_(bytes) {
#ifndef __SANITIZE_ADDRESS__  // which sees the ends of blocks on pages of their own only
  if (bytes >= kSmall && bytes <= kShared / 2) {
    data_ = cut(bytes);
    return;
  }
#endif
  data_ = allocate(bytes, bytes > kShared / 2 ? kHugePage : kLine);
}

Memory Memory::alone(std::size_t bytes) {
  Memory memory;
  memory.data_ = allocate(bytes, bytes >= kSmall ? kHugePage : kLine);
  memory.bytes_ = bytes;
  return memory;
}

Memory Memory::readable_past(std::size_t bytes) {
  Memory memory(bytes + kReadable);
  std::memset(memory.as<char>() + bytes, 0, kReadable);
  return memory;
}

}  // namespace sparsam
