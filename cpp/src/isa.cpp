#include "sparsam/isa.hpp"

#include <atomic>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "rows.hpp"

namespace sparsam {
namespace {

#if defined(__x86_64__)
bool has_f16c() {  // not a name that every compiler's __builtin_cpu_supports knows
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
#endif

std::uint32_t detect() {
  std::uint32_t features = kNone;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
      __builtin_cpu_supports("bmi2") && has_f16c())
    features |= kAvx2;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512cd"))
    features |= kAvx512;
#endif
  return features;
}

bool runs_here(const KernelTable& row) {
  static const std::uint32_t features = detect();
  return (row.required & ~features) == 0;
}

const KernelTable* best_row() {
  for (const KernelTable* row : kRows)
    if (runs_here(*row)) return row;
  return nullptr;  // the generic row requires nothing, so this is never reached
}

std::atomic<const KernelTable*>& active() {
  static std::atomic<const KernelTable*> row{best_row()};
  return row;
}

std::string joined(const std::vector<std::string>& names) {
  std::string all;
  for (const std::string& name : names) all += (all.empty() ? "" : ", ") + name;
  return all;
}

}  // namespace

const KernelTable& kernels() { return *active().load(std::memory_order_relaxed); }

std::string active_isa() { return kernels().name; }

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const KernelTable* row : kRows) names.emplace_back(row->name);
  return names;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const KernelTable* row : kRows)
    if (runs_here(*row)) names.emplace_back(row->name);
  return names;
}

void use_isa(const std::string& name) {
  for (const KernelTable* row : kRows) {
    if (row->name == name && runs_here(*row)) {
      active().store(row);
      return;
    }
  }
  throw std::invalid_argument("instruction set: expected one that this machine runs (" +
                              joined(available_isas()) + "); got '" + name + "'");
}

}  // namespace sparsam
