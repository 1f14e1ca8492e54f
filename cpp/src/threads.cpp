#include "sparsam/threads.hpp"

#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>
#ifdef __linux__
#include <link.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "sparsam/float_mode.hpp"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace sparsam {
namespace {

std::atomic<int> g_wanted{0};
std::atomic<bool> g_forked{false};
std::atomic<bool> g_refused{false};  // the system could create no more threads when last asked
std::atomic<void (*)()> g_interrupt_check{nullptr};

// OpenMP threads do not survive fork, and the runtime would wait for them forever: a forked child uses one
// thread.
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

// The functions of an OpenMP runtime that this file calls. GOMP_parallel is GCC's entry point; the runtimes
// of LLVM and Intel have it too.
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
thread_local bool t_in_parallel = false;

// Without OpenMP: new threads for each call. If no more can be created, the existing ones do all the work.
void own_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  const auto work = [=] {
    t_in_parallel = true;
    body(data);
    t_in_parallel = false;
  };
  std::vector<std::thread> team;
  team.reserve(threads - 1);
  try {
    while (team.size() + 1 < threads) team.emplace_back(work);
  } catch (const std::system_error&) {
    g_refused.store(true);
  }
  work();
  for (std::thread& member : team) member.join();
}
const Runtime g_own{own_parallel,
                    [] { return std::max(1, static_cast<int>(std::thread::hardware_concurrency())); },
                    [] { return static_cast<int>(t_in_parallel); }};
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
  void* const handle = dlopen(library.c_str(), RTLD_LAZY | RTLD_NOLOAD);  // never closed
  Runtime found{};
  if (handle == nullptr || !find(handle, "GOMP_parallel", &found.parallel) ||
      !find(handle, "omp_in_parallel", &found.in_parallel))
    return false;
  // at::get_num_threads() if it is PyTorch: its setting also applies to threads in which OpenMP has no
  // setting of its own.
  if (!find(handle, "_ZN2at15get_num_threadsEv", &found.max_threads) &&
      !find(handle, "omp_get_max_threads", &found.max_threads))
    return false;
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  if (&runtime() == &g_own) {
    g_foreign = found;
    g_runtime.store(&g_foreign, std::memory_order_release);
  }
  return true;
}

namespace {

// Adopts PyTorch's runtime as soon as PyTorch is loaded, whatever was imported when. Libraries are searched
// only if some were loaded since the last search.
void adopt_pytorch() {
#ifdef __linux__
  if (&runtime() != &g_own || g_forked.load()) return;
  static std::atomic<unsigned long long> looked_through{0};
  unsigned long long loaded = 0;
  const auto count = [](dl_phdr_info* first, std::size_t, void* out) {
    *static_cast<unsigned long long*>(out) = first->dlpi_adds;
    return 1;
  };
  dl_iterate_phdr(count, &loaded);
  if (looked_through.exchange(loaded) == loaded) return;
  std::string library;
  const auto look = [](dl_phdr_info* one, std::size_t, void* out) {
    const std::string name = one->dlpi_name == nullptr ? "" : one->dlpi_name;
    if (name.find("/libtorch_cpu.so") == std::string::npos) return 0;
    *static_cast<std::string*>(out) = name;
    return 1;
  };
  dl_iterate_phdr(look, &library);
  if (!library.empty()) adopt_runtime(library);
#endif
}

}  // namespace

int default_num_threads() {
  static const int cpus = std::min(affinity_cpus(), cgroup_cpus());
  adopt_pytorch();
  return std::max(1, std::min(runtime().max_threads(), cpus));
}

int num_threads() {
  if (g_forked.load()) return 1;
  const int wanted = g_wanted.load();
  return wanted > 0 ? wanted : default_num_threads();
}

void set_num_threads(int n) { g_wanted.store(n); }

std::string threading_runtime() {
  adopt_pytorch();
  const Runtime& now = runtime();
#ifdef _OPENMP
  std::string name = "OpenMP " + std::to_string(_OPENMP);
#else
  if (&now == &g_own) return g_forked.load() ? "std::thread, serial in this forked child" : "std::thread";
  std::string name = "OpenMP";
#endif
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(now.in_parallel), &info) != 0 && info.dli_fname != nullptr) {
    const std::string path = info.dli_fname;
    name += " (" + path.substr(path.find_last_of('/') + 1) + ")";
  }
  if (g_forked.load()) name += ", serial in this forked child";
  if (g_refused.load()) name += ", serial where the system makes no more threads";
  return name;
}

std::size_t worker_count(std::size_t tasks, bool parallel) {
  if (!parallel || tasks <= 1) return 1;
  adopt_pytorch();
  if (runtime().in_parallel() != 0) return 1;
  return std::min(tasks, static_cast<std::size_t>(num_threads()));
}

bool is_main_thread() {
#ifdef __linux__
  return syscall(SYS_gettid) == getpid();
#else
  return pthread_main_np() != 0;
#endif
}

void set_interrupt_check(void (*check)()) { g_interrupt_check.store(check); }

namespace {

using Clock = std::chrono::steady_clock;
constexpr std::chrono::milliseconds kBetweenChecks{50};

struct Job {
  std::size_t tasks;
  void (*body)(void*, std::size_t, std::size_t);
  void* context;
  void (*check)();
  std::thread::id caller = std::this_thread::get_id();
  std::uint64_t mode = float_mode();
  std::atomic<std::size_t> next{0}, entered{0};
  std::atomic<bool> stopped{false};
  std::mutex mutex{};
  std::exception_ptr failure{};

  // No check after a task is claimed: other threads may wait for its result.
  void run(std::size_t worker, bool checks) {
    auto due = checks ? Clock::now() + kBetweenChecks : Clock::time_point{};
    while (!stopped.load(std::memory_order_relaxed)) {
      if (checks && Clock::now() >= due) {
        check();
        due = Clock::now() + kBetweenChecks;
      }
      const std::size_t task = next.fetch_add(1, std::memory_order_relaxed);
      if (task >= tasks) return;
      body(context, worker, task);
    }
  }

  void work() {
    const std::uint64_t own = float_mode();
    change_float_mode(own, mode);
    try {
      run(entered.fetch_add(1, std::memory_order_relaxed),
          tasks > 1 && check != nullptr && std::this_thread::get_id() == caller);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      if (failure == nullptr) failure = std::current_exception();
      stopped.store(true);
    }
    change_float_mode(mode, own);
  }
};

// The stack that an OpenMP runtime gives a thread, in bytes; 0 if not specified.
std::size_t wanted_stack() {
  const char* text = std::getenv("OMP_STACKSIZE");
  if (text == nullptr) return 0;
  char* end = nullptr;
  const double number = std::strtod(text, &end);
  while (*end == ' ') ++end;
  const char unit = *end;
  const int shift = unit == 'B' || unit == 'b'   ? 0
                    : unit == 'M' || unit == 'm' ? 20
                    : unit == 'G' || unit == 'g' ? 30
                                                 : 10;
  const double bytes = std::ldexp(number, shift);
  return bytes > 0 && bytes < 0x1p62 ? static_cast<std::size_t>(bytes) : 0;
}

void* wait_for_the_door(void* door) {
  const std::lock_guard<std::mutex> lock(*static_cast<std::mutex*>(door));
  return nullptr;
}

// Whether `more` threads can exist beside this one. OpenMP runtimes end the process if they cannot create a
// thread, so this is tested first, once for each calling thread and number of threads, since each calling
// thread has a team of its own.
bool can_make(std::size_t more) {
  static thread_local std::size_t made = 0;
  if (more <= made) return true;
  pthread_attr_t attributes;
  if (pthread_attr_init(&attributes) != 0) return false;
  const std::size_t stack = wanted_stack();
  if (stack > 0) pthread_attr_setstacksize(&attributes, stack);
  std::vector<pthread_t> threads(more);
  std::size_t count = 0;
  {
    std::mutex door;
    {
      const std::lock_guard<std::mutex> closed(door);
      while (count < more && pthread_create(&threads[count], &attributes, wait_for_the_door, &door) == 0)
        ++count;
    }
    for (std::size_t i = 0; i < count; ++i) pthread_join(threads[i], nullptr);
  }
  pthread_attr_destroy(&attributes);
  g_refused.store(count < more);
  if (count == more) made = more;
  return count == more;
}

}  // namespace

void run_tasks(std::size_t tasks, std::size_t workers, Interrupts interrupts,
               void (*body)(void*, std::size_t, std::size_t), void* context) {
  Job job{tasks, body, context, interrupts == Interrupts::allowed ? g_interrupt_check.load() : nullptr};
  if (workers == 1 || !can_make(workers - 1))
    job.work();
  else
    runtime().parallel([](void* data) { static_cast<Job*>(data)->work(); }, &job,
                       static_cast<unsigned>(workers), 0);
  if (job.failure != nullptr) std::rethrow_exception(job.failure);
}

}  // namespace sparsam
