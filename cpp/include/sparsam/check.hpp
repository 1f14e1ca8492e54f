// Checks of ranges in the assertion build (SPARSAM_CHECKS); nothing in other builds. Simple enough to be used
// in kernels.
#pragma once

#ifdef SPARSAM_CHECKS
#define SPARSAM_CHECK(condition) ((condition) ? static_cast<void>(0) : __builtin_trap())
#else
#define SPARSAM_CHECK(condition) static_cast<void>(0)
#endif
