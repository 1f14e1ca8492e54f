// Which instruction set the kernels use. One row of the kernel table per set; the best that the machine has
// is active.
#pragma once
#include <string>
#include <vector>

namespace sparsam {

struct KernelTable;

const KernelTable& kernels();  // the active row
std::string active_isa();
std::vector<std::string> compiled_isas();   // best first
std::vector<std::string> available_isas();  // those of them that this machine runs, best first
void use_isa(const std::string& name);      // throws std::invalid_argument

}  // namespace sparsam
