// Tensors of PyTorch as the core reads them, by DLPack's table of functions (version 1.3 of its header, a
// stable ABI): no call of Python, and no library of PyTorch to link with.
#pragma once
#include <cstdint>

#include "arrays.hpp"

namespace sparsam {

// DLTensor, field by field.
struct TensorView {
  void* data;
  std::int32_t device_type;
  std::int32_t device_id;
  std::int32_t ndim;
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;

  [[nodiscard]] bool is_float32() const { return code == 2 && bits == 32 && lanes == 1; }
  [[nodiscard]] bool is_bfloat16() const { return code == 4 && bits == 16 && lanes == 1; }
  // On the CPU and in C order.
  [[nodiscard]] bool is_plain() const {
    std::int64_t step = 1;
    for (std::int32_t i = ndim - 1; i >= 0; --i) {
      if (shape[i] != 1 && strides[i] != step) return false;
      step *= shape[i];
    }
    return device_type == 1;
  }
  template <class T>
  [[nodiscard]] T* as() const {
    return reinterpret_cast<T*>(static_cast<char*>(data) + byte_offset);
  }
};

// What PyTorch's table fills in for one of its tensors; false, without an error, for what has no such memory.
bool view_of_tensor(py::handle tensor, TensorView& view);

}  // namespace sparsam
