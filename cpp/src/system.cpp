#include "system.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#ifdef _WIN32
#define WIN32_LEAN_AND_MEAN
#ifndef NOMINMAX
#define NOMINMAX
#endif
#include <malloc.h>
#include <windows.h>
#else
#include <dlfcn.h>
#include <pthread.h>
#endif
#ifdef __linux__
#include <link.h>
#include <sched.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace sparsam::system {
namespace {

constexpr std::size_t kLine = 64;

#ifdef __linux__

bool read_numbers(const char* path, const char* format, double* a, double* b) {
  std::FILE* f = std::fopen(path, "r");
  if (f == nullptr) return false;
  const int read = std::fscanf(f, format, a, b);
  std::fclose(f);
  return read == (b != nullptr ? 2 : 1);
}

constexpr std::size_t kHugePage = std::size_t{1} << 21;

// Mapped directly, so that freed memory returns to the system: a heap may keep it. Only whole huge pages are
// requested; a partly used one would take memory that `bytes` does not count.
char* map(std::size_t bytes) {
  const std::size_t room = bytes + kHugePage;
  void* const all = mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (all == MAP_FAILED) throw std::bad_alloc();
  char* const begin = static_cast<char*>(all);
  const std::size_t before = -reinterpret_cast<std::uintptr_t>(all) % kHugePage;
  const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  const std::size_t end = (before + bytes + page - 1) / page * page, whole = bytes / kHugePage * kHugePage;
  if (before > 0) munmap(begin, before);
  if (room > end) munmap(begin + end, room - end);
  if (whole > 0) madvise(begin + before, whole, MADV_HUGEPAGE);
  return begin + before;
}

#endif

#ifdef _WIN32

const DWORD g_main_thread = GetCurrentThreadId();  // which loads this library

DWORD WINAPI wait_for_the_door(void* door) {
  const std::lock_guard<std::mutex> lock(*static_cast<std::mutex*>(door));
  return 0;
}

#else

void* wait_for_the_door(void* door) {
  const std::lock_guard<std::mutex> lock(*static_cast<std::mutex*>(door));
  return nullptr;
}

#endif

}  // namespace

int affinity_cpus() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
#elif defined(_WIN32)
  DWORD_PTR mine = 0, all = 0;
  if (GetProcessAffinityMask(GetCurrentProcess(), &mine, &all) != 0 && mine != 0) {
    int count = 0;
    for (; mine != 0; mine &= mine - 1) ++count;
    return count;
  }
#endif
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

int quota_cpus() {
#ifdef __linux__
  double quota = 0, period = 0;
  const bool v2 = read_numbers("/sys/fs/cgroup/cpu.max", "%lf %lf", &quota, &period);
  const bool v1 = !v2 && read_numbers("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "%lf", &quota, nullptr) &&
                  read_numbers("/sys/fs/cgroup/cpu/cpu.cfs_period_us", "%lf", &period, nullptr);
  if ((v2 || v1) && quota > 0 && period > 0) return std::max(1, static_cast<int>(std::ceil(quota / period)));
#endif
  return 1 << 20;
}

bool is_main_thread() {
#if defined(__linux__)
  return syscall(SYS_gettid) == getpid();
#elif defined(_WIN32)
  return GetCurrentThreadId() == g_main_thread;
#else
  return pthread_main_np() != 0;
#endif
}

void after_fork_in_child([[maybe_unused]] void (*function)()) {
#ifndef _WIN32
  pthread_atfork(nullptr, nullptr, function);
#endif
}

std::size_t create_threads(std::size_t wanted, std::size_t stack) {
  std::size_t count = 0;
  std::mutex door;
  std::unique_lock<std::mutex> closed(door);
#ifdef _WIN32
  std::vector<HANDLE> threads(wanted);
  while (count < wanted) {
    threads[count] = CreateThread(nullptr, stack, wait_for_the_door, &door, 0, nullptr);
    if (threads[count] == nullptr) break;
    ++count;
  }
  closed.unlock();
  for (std::size_t i = 0; i < count; ++i) {
    WaitForSingleObject(threads[i], INFINITE);
    CloseHandle(threads[i]);
  }
#else
  pthread_attr_t attributes;
  if (pthread_attr_init(&attributes) != 0) return 0;
  if (stack > 0) pthread_attr_setstacksize(&attributes, stack);
  std::vector<pthread_t> threads(wanted);
  while (count < wanted && pthread_create(&threads[count], &attributes, wait_for_the_door, &door) == 0)
    ++count;
  closed.unlock();
  for (std::size_t i = 0; i < count; ++i) pthread_join(threads[i], nullptr);
  pthread_attr_destroy(&attributes);
#endif
  return count;
}

void* loaded_library(const std::string& path) {
#ifdef _WIN32
  return reinterpret_cast<void*>(GetModuleHandleA(path.c_str()));
#else
  return dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);  // never closed
#endif
}

void* function_of(void* library, const char* name) {
#ifdef _WIN32
  return reinterpret_cast<void*>(GetProcAddress(static_cast<HMODULE>(library), name));
#else
  return dlsym(library, name);
#endif
}

std::string library_of([[maybe_unused]] void* function) {
#ifndef _WIN32
  Dl_info info;
  if (dladdr(function, &info) != 0 && info.dli_fname != nullptr) return info.dli_fname;
#endif
  return {};
}

std::string newly_loaded([[maybe_unused]] const char* text) {
#ifdef __linux__
  static std::atomic<unsigned long long> looked_through{0};
  unsigned long long loaded = 0;
  const auto count = [](dl_phdr_info* first, std::size_t, void* out) {
    *static_cast<unsigned long long*>(out) = first->dlpi_adds;
    return 1;
  };
  dl_iterate_phdr(count, &loaded);
  if (looked_through.exchange(loaded) == loaded) return {};
  struct Search {
    const char* text;
    std::string found;
  } search{text, {}};
  const auto look = [](dl_phdr_info* one, std::size_t, void* out) {
    Search& wanted = *static_cast<Search*>(out);
    const std::string name = one->dlpi_name == nullptr ? "" : one->dlpi_name;
    if (name.find(wanted.text) == std::string::npos) return 0;
    wanted.found = name;
    return 1;
  };
  dl_iterate_phdr(look, &search);
  return search.found;
#else
  return {};
#endif
}

char* allocate(std::size_t bytes, std::size_t* mapped) {
  *mapped = 0;
#ifdef __linux__
  if (bytes >= kHugePage / 2) {
    *mapped = bytes;
    return map(bytes);
  }
#endif
  void* data = nullptr;
#ifdef _WIN32
  data = _aligned_malloc(bytes == 0 ? kLine : bytes, kLine);
#else
  if (posix_memalign(&data, kLine, bytes == 0 ? kLine : bytes) != 0) data = nullptr;
#endif
  if (data == nullptr) throw std::bad_alloc();
  return static_cast<char*>(data);
}

void release(char* memory, [[maybe_unused]] std::size_t mapped) {
#if defined(__linux__)
  if (mapped > 0) {
    munmap(memory, mapped);
    return;
  }
  std::free(memory);
#elif defined(_WIN32)
  _aligned_free(memory);
#else
  std::free(memory);
#endif
}

bool has_dot_products() {
#if defined(__aarch64__) && defined(__linux__)
  constexpr unsigned long kDotProducts = 1ul << 20;  // HWCAP_ASIMDDP, missing in older headers
  return (getauxval(AT_HWCAP) & kDotProducts) != 0;
#elif defined(__aarch64__) && defined(__APPLE__)
  return true;  // all Apple CPUs have them
#else
  return false;
#endif
}

}  // namespace sparsam::system
