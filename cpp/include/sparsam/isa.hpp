// Which instruction set the kernels use. One row of the kernel table per set; the best that the machine has
// is active.
#pragma once
#include <cstddef>
#include <string>
#include <vector>

namespace sparsam {

struct KernelTable;
struct Int8Kernels;

const KernelTable& kernels();  // the active row

// The best kernels for int8 values that the machine can run while this row is active; and those for slots of
// one geometry (the generic ones if no others have that geometry).
const Int8Kernels& int8_kernels();
const Int8Kernels& int8_kernels(std::size_t lanes, std::size_t window);
const Int8Kernels& int4_kernels();  // the same for int4 values
const Int8Kernels& int4_kernels(std::size_t lanes);
const Int8Kernels& int4_bitmask_kernels();
std::string active_isa();
std::vector<std::string> compiled_isas();   // best first
std::vector<std::string> available_isas();  // those that this machine can run, best first
void use_isa(const std::string& name);      // throws std::invalid_argument

// The rows for int8 values that run under the active row, best first; and which of them is to run wherever it
// does, instead of the best: for measuring and testing. "" is the best again.
std::vector<std::string> int8_isas();
void use_int8_isa(const std::string& name);  // throws std::invalid_argument

}  // namespace sparsam
