#include "sparsam/isa.hpp"

#include <atomic>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "rows.hpp"
#include "sparsam/errors.hpp"
#include "system.hpp"

namespace sparsam {
namespace {

#if defined(__x86_64__)
bool has_f16c() {  // some compilers' __builtin_cpu_supports does not know this name
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}

// Every compiler that knows the instructions, but not every __builtin_cpu_supports, knows the name.
bool has_avx_vnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & 1u << 4) != 0;
}
#endif

std::uint32_t detect() {
  std::uint32_t features = kNone;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
      __builtin_cpu_supports("bmi2") && has_f16c())
    features |= kAvx2;
  if ((features & kAvx2) != 0 && has_avx_vnni()) features |= kAvxVnni;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512cd"))
    features |= kAvx512;
  if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
      __builtin_cpu_supports("avx512vbmi2"))
    features |= kVnni;
#elif defined(__aarch64__)
  features |= kNeon;
  if (system::has_dot_products()) features |= kDot;
#endif
  return features;
}

std::uint32_t machine() {
  static const std::uint32_t features = detect();
  return features;
}

bool runs_here(const KernelTable& row) { return (row.required & ~machine()) == 0; }

// Whether int8 kernels may run while a row is active: the machine has all the features that they need, and
// the row includes those of these features that have a row of their own.
bool runs_under(const Int8Kernels& int8, const KernelTable& row) {
  constexpr std::uint32_t kWithRow = kAvx2 | kAvx512 | kNeon;
  return (int8.required & ~machine()) == 0 && (int8.required & kWithRow & ~row.required) == 0;
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

std::atomic<const Int8Kernels*>& wanted_int8() {
  static std::atomic<const Int8Kernels*> row{nullptr};
  return row;
}

std::string joined(const std::vector<std::string>& names) {
  std::string all;
  for (const std::string& name : names) all += (all.empty() ? "" : ", ") + name;
  return all;
}

}  // namespace

const KernelTable& kernels() { return *active().load(std::memory_order_relaxed); }

const Int8Kernels& int8_kernels() {
  const KernelTable& row = kernels();
  const Int8Kernels* const wanted = wanted_int8().load(std::memory_order_relaxed);
  if (wanted != nullptr && runs_under(*wanted, row)) return *wanted;
  for (const Int8Kernels* int8 : kInt8Rows)
    if (runs_under(*int8, row)) return *int8;
  return *kInt8Rows[0];  // the generic row requires nothing, so this is never reached
}

const Int8Kernels& int8_kernels(std::size_t lanes, std::size_t window) {
  const KernelTable& row = kernels();
  const Int8Kernels& best = int8_kernels();
  if (best.lanes == lanes && best.window == window) return best;
  for (const Int8Kernels* int8 : kInt8Rows)
    if (int8->lanes == lanes && int8->window == window && runs_under(*int8, row)) return *int8;
  return int8_rows::generic;
}

const Int8Kernels& int4_kernels() {
  const KernelTable& row = kernels();
  for (const Int8Kernels* int8 : kInt8Rows)
    if (int8->multiply_int4 != nullptr && runs_under(*int8, row)) return *int8;
  return int8_rows::generic;  // has all of them and requires nothing, so this is never reached
}

const Int8Kernels& int4_kernels(std::size_t lanes) {
  const KernelTable& row = kernels();
  for (const Int8Kernels* int8 : kInt8Rows)
    if (int8->multiply_int4 != nullptr && int8->int4_lanes == lanes && runs_under(*int8, row)) return *int8;
  return int8_rows::generic;
}

const Int8Kernels& int4_bitmask_kernels() {
  const KernelTable& row = kernels();
  for (const Int8Kernels* int8 : kInt8Rows)
    if (int8->multiply_int4_bitmask != nullptr && runs_under(*int8, row)) return *int8;
  return int8_rows::generic;
}

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

std::vector<std::string> int8_isas() {
  std::vector<std::string> names;
  for (const Int8Kernels* int8 : kInt8Rows)
    if (runs_under(*int8, kernels())) names.emplace_back(int8->name);
  return names;
}

void use_int8_isa(const std::string& name) {
  if (name.empty()) {
    wanted_int8().store(nullptr);
    return;
  }
  for (const Int8Kernels* int8 : kInt8Rows)
    if (int8->name == name && runs_under(*int8, kernels())) {
      wanted_int8().store(int8);
      return;
    }
  throw std::invalid_argument(
      expected("instruction set of int8 values", quoted(name),
               "one that runs under " + active_isa() + " (" + joined(int8_isas()) + ")", "pass one of them"));
}

void use_isa(const std::string& name) {
  for (const KernelTable* row : kRows) {
    if (row->name == name && runs_here(*row)) {
      active().store(row);
      return;
    }
  }
  throw std::invalid_argument(expected("instruction set", quoted(name),
                                       "one that this machine runs (" + joined(available_isas()) + ")",
                                       "pass one of them"));
}

}  // namespace sparsam
