// The only interface to threads: numbered tasks, claimed one by one from a shared counter in increasing
// order.
#pragma once
#include <cstddef>
#include <string>
#include <type_traits>

namespace sparsam {

// Threads that a call may use: what set_num_threads() was told, else SPARSAM_NUM_THREADS as set by Python,
// else the smallest of OpenMP's maximum at the time of the call, the CPUs in the affinity mask and the
// cgroup's quota. 1 in a forked child.
int num_threads();
int default_num_threads();
void set_num_threads(int n);  // n >= 1
std::string threading_runtime();

// From now on runs parallel work on the OpenMP runtime that an already loaded library uses: two runtimes in
// one process spin on the same cores. The first one adopted stays; PyTorch's is adopted automatically at the
// first parallel work after it was loaded. Returns false, and changes nothing, if the library is not loaded
// or has no such runtime.
bool adopt_runtime(const std::string& library);

// How many threads should share `tasks` tasks now. Ask once per call and size per-worker memory by the
// answer: another thread may change the setting in between.
std::size_t worker_count(std::size_t tasks, bool parallel);

// Whether the user may interrupt a call before all of its tasks are done; not if it writes results that must
// not be left incomplete.
enum class Interrupts { allowed, held };

bool is_main_thread();  // the process's first, or the one that forked it

// A function that throws if the user wants to stop; null for none. The thread that makes a call runs it
// between two of its tasks, at most 20 times a second.
void set_interrupt_check(void (*check)());

// Calls body(context, worker, task) once for each task in [0, tasks), worker < workers. Tasks are claimed in
// increasing order, so a task may wait for results of earlier tasks: a claimed task is always started. All
// workers compute in the caller's floating-point mode. The first exception of a body or of the interrupt
// check keeps further tasks from being claimed, and is thrown here once all workers have stopped.
void run_tasks(std::size_t tasks, std::size_t workers, Interrupts interrupts,
               void (*body)(void*, std::size_t, std::size_t), void* context);

template <class Body>
void for_each_task(std::size_t tasks, std::size_t workers, Interrupts interrupts, Body&& body) {
  run_tasks(
      tasks, workers, interrupts,
      [](void* context, std::size_t worker, std::size_t task) {
        (*static_cast<std::remove_reference_t<Body>*>(context))(worker, task);
      },
      &body);
}

template <class Body>
void for_each_task(std::size_t tasks, std::size_t workers, Body&& body) {
  for_each_task(tasks, workers, Interrupts::allowed, body);
}

}  // namespace sparsam
