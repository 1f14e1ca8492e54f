#include "sparsam/threads.hpp"

#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <thread>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace sparsam {
namespace {

std::atomic<int> g_wanted{0};
std::atomic<bool> g_forked{false};

// An OpenMP team does not survive fork, whoever in this process started it, and its runtime waits for it
// forever: a forked child works alone.
void after_fork_in_child() { g_forked.store(true); }
const int g_fork_handler = pthread_atfork(nullptr, nullptr, after_fork_in_child);

int affinity_cpus() {
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

bool read_numbers(const char* path, const char* format, double* a, double* b) {
  std::FILE* f = std::fopen(path, "r");
  if (f == nullptr) return false;
  const int read = std::fscanf(f, format, a, b);
  std::fclose(f);
  return read == (b != nullptr ? 2 : 1);
}

int cgroup_cpus() {
  double quota = 0, period = 0;
  const bool v2 = read_numbers("/sys/fs/cgroup/cpu.max", "%lf %lf", &quota, &period);
  const bool v1 = !v2 && read_numbers("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "%lf", &quota, nullptr) &&
                  read_numbers("/sys/fs/cgroup/cpu/cpu.cfs_period_us", "%lf", &period, nullptr);
  if ((!v2 && !v1) || quota <= 0 || period <= 0) return 1 << 20;
  return std::max(1, static_cast<int>(std::ceil(quota / period)));
}

}  // namespace

int default_num_threads() {
#ifdef _OPENMP
  const int most = omp_get_max_threads();
#else
  const int most = 1;
#endif
  static const int n = std::min({most, affinity_cpus(), cgroup_cpus()});
  return n;
}

int num_threads() {
  if (g_forked.load()) return 1;
#ifdef _OPENMP
  const int wanted = g_wanted.load();
  return wanted > 0 ? wanted : default_num_threads();
#else
  return 1;
#endif
}

void set_num_threads(int n) { g_wanted.store(n); }

std::string threading_runtime() {
#ifdef _OPENMP
  Dl_info info;
  std::string name = "OpenMP " + std::to_string(_OPENMP);
  if (dladdr(reinterpret_cast<void*>(&omp_get_max_threads), &info) != 0 && info.dli_fname != nullptr) {
    const std::string path = info.dli_fname;
    name += " (" + path.substr(path.find_last_of('/') + 1) + ")";
  }
  if (g_forked.load()) name += ", serial in this forked child";
  return name;
#else
  return "none (built without OpenMP: serial)";
#endif
}

std::size_t worker_count(std::size_t tasks, bool parallel) {
#ifdef _OPENMP
  if (parallel && tasks > 1 && omp_in_parallel() == 0)
    return std::min(tasks, static_cast<std::size_t>(num_threads()));
#endif
  (void)tasks;
  (void)parallel;
  return 1;
}

void run_tasks(std::size_t tasks, std::size_t workers, void (*body)(void*, std::size_t, std::size_t),
               void* context) {
  if (workers == 1) {
    for (std::size_t task = 0; task < tasks; ++task) body(context, 0, task);
    return;
  }
#ifdef _OPENMP
  std::atomic<std::size_t> next{0};
#pragma omp parallel num_threads(static_cast<int>(workers))
  {
    const auto worker = static_cast<std::size_t>(omp_get_thread_num());
    for (std::size_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;)
      body(context, worker, task);
  }
#endif
}

}  // namespace sparsam
