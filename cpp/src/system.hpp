// What this package needs of the operating system. Only system.cpp knows which one it is.
#pragma once
#include <cstddef>
#include <string>

namespace sparsam::system {

// CPUs that this process may run on, and as many as its container's share of time amounts to; a large number
// without a limit.
int affinity_cpus();
int quota_cpus();

bool is_main_thread();

// Calls a function in forked children; never where there is no fork.
void after_fork_in_child(void (*function)());

// Creates threads of that stack size in bytes, 0 for the default one, that all exist at the same time, and
// ends them. Returns how many there were: fewer than `wanted` where the system refused more.
std::size_t create_threads(std::size_t wanted, std::size_t stack);

// A library that is loaded already, and one of its functions; nullptr if there is none.
void* loaded_library(const std::string& path);
void* function_of(void* library, const char* name);

// The path of the library that has a function; empty if unknown.
std::string library_of(void* function);

// The path of the loaded library whose path contains a text; empty if there is none, if no library was loaded
// since the last call, or where the system does not tell.
std::string newly_loaded(const char* text);

// Memory aligned to cache lines, on huge pages where it is large; `*mapped` is for `release`.
char* allocate(std::size_t bytes, std::size_t* mapped);
void release(char* memory, std::size_t mapped);

// Whether this ARM processor has the instructions for dot products of int8.
bool has_dot_products();

}  // namespace sparsam::system
