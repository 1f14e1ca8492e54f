#include "sparsam/memory.hpp"

#include "system.hpp"

namespace sparsam {

Memory::Memory(std::size_t bytes) : data_(nullptr, Free{0}), bytes_(bytes) {
  std::size_t mapped = 0;
  char* const data = system::allocate(bytes, &mapped);
  data_ = {data, Free{mapped}};
}

void Memory::Free::operator()(char* p) const { system::release(p, mapped); }

}  // namespace sparsam
