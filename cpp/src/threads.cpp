#include "sparsam/threads.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "sparsam/float_mode.hpp"
#include "system.hpp"

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
const bool g_fork_handler = [] {
  system::after_fork_in_child([] { g_forked.store(true); });
  return true;
}();

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
  *found = reinterpret_cast<Function*>(system::function_of(library, name));
  return *found != nullptr;
}

}  // namespace

bool adopt_runtime(const std::string& library) {
  void* const handle = system::loaded_library(library);
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
  if (&runtime() != &g_own || g_forked.load()) return;
  const std::string library = system::newly_loaded("/libtorch_cpu.so");
  if (!library.empty()) adopt_runtime(library);
}

}  // namespace

int default_num_threads() {
  static const int cpus = std::min(system::affinity_cpus(), system::quota_cpus());
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
  const std::string path = system::library_of(reinterpret_cast<void*>(now.in_parallel));
  if (!path.empty()) name += " (" + path.substr(path.find_last_of('/') + 1) + ")";
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

bool is_main_thread() { return system::is_main_thread(); }

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

// Whether `more` threads can exist beside this one. OpenMP runtimes end the process if they cannot create a
// thread, so this is tested first, once for each calling thread and number of threads, since each calling
// thread has a team of its own.
bool can_make(std::size_t more) {
  static thread_local std::size_t made = 0;
  if (more <= made) return true;
  const std::size_t count = system::create_threads(more, wanted_stack());
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
