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

// What this file needs of an OpenMP runtime. Of a foreign one, GOMP_parallel: GCC's entry point, which LLVM's
// and Intel's runtimes have too.
struct Runtime {
  void (*parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
  int (*max_threads)();
  int (*in_parallel)();
};

#ifdef _OPENMP
void own_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
#pragma omp parallel num_threads(static_cast<int>(threads))
  body(data);
}
const Runtime g_own{own_parallel, omp_get_max_threads, omp_in_parallel};
#else
const Runtime g_own{nullptr, [] { return 1; }, [] { return 0; }};
#endif
Runtime g_foreign;
std::atomic<const Runtime*> g_runtime{&g_own};

const Runtime& runtime() { return *g_runtime.load(std::memory_order_acquire); }

template <class Function>
bool find(void* library, const char* name, Function** found) {
  *found = reinterpret_cast<Function*>(dlsym(library, name));
  return *found != nullptr;
}

}  // namespace

bool adopt_runtime(const std::string& library) {
  void* const handle = dlopen(library.c_str(), RTLD_LAZY | RTLD_NOLOAD);  // kept: it is never closed
  Runtime found{};
  if (handle == nullptr || !find(handle, "GOMP_parallel", &found.parallel) ||
      !find(handle, "omp_in_parallel", &found.in_parallel))
    return false;
  // at::get_num_threads(), where it is PyTorch: its setting holds for threads that OpenMP was never asked
  // from.
  if (!find(handle, "_ZN2at15get_num_threadsEv", &found.max_threads) &&
      !find(handle, "omp_get_max_threads", &found.max_threads))
    return false;
  if (runtime().parallel == g_own.parallel) {
    g_foreign = found;
    g_runtime.store(&g_foreign, std::memory_order_release);
  }
  return true;
}

int default_num_threads() {
  static const int cpus = std::min(affinity_cpus(), cgroup_cpus());
  static const int own = g_own.max_threads();
  const Runtime& now = runtime();
  return std::max(1, std::min(&now == &g_own ? own : now.max_threads(), cpus));
}

int num_threads() {
  if (g_forked.load() || runtime().parallel == nullptr) return 1;
  const int wanted = g_wanted.load();
  return wanted > 0 ? wanted : default_num_threads();
}

void set_num_threads(int n) { g_wanted.store(n); }

std::string threading_runtime() {
  const Runtime& now = runtime();
  if (now.parallel == nullptr) return "none (built without OpenMP: serial)";
#ifdef _OPENMP
  std::string name = "OpenMP " + std::to_string(_OPENMP);
#else
  std::string name = "OpenMP";
#endif
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(now.in_parallel), &info) != 0 && info.dli_fname != nullptr) {
    const std::string path = info.dli_fname;
    name += " (" + path.substr(path.find_last_of('/') + 1) + ")";
  }
  if (g_forked.load()) name += ", serial in this forked child";
  return name;
}

std::size_t worker_count(std::size_t tasks, bool parallel) {
  if (!parallel || tasks <= 1 || runtime().in_parallel() != 0) return 1;
  return std::min(tasks, static_cast<std::size_t>(num_threads()));
}

void run_tasks(std::size_t tasks, std::size_t workers, void (*body)(void*, std::size_t, std::size_t),
               void* context) {
  struct Job {
    std::size_t tasks;
    void (*body)(void*, std::size_t, std::size_t);
    void* context;
    std::atomic<std::size_t> next{0}, entered{0};

    void work() {
      const std::size_t worker = entered.fetch_add(1, std::memory_order_relaxed);
      for (std::size_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;)
        body(context, worker, task);
    }
  } job{tasks, body, context};
  if (workers == 1)
    job.work();
  else
    runtime().parallel([](void* data) { static_cast<Job*>(data)->work(); }, &job,
                       static_cast<unsigned>(workers), 0);
}

}  // namespace sparsam
