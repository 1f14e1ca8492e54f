// The row of int8 kernels for AArch64 machines without dot products. See cpp/README.md for what may be
// included here.
#define SPARSAM_TARGET neon
#include "floats_neon.hpp"
#include "int8_neon.hpp"

#include "int4_neon.hpp"

#include "int4_slots-inl.hpp"
#include "int8_slots-inl.hpp"
#include "table.hpp"

namespace sparsam::int8_rows {

extern const Int8Kernels neon;
const Int8Kernels neon = {
    "neon",
    kNeon,
    8,
    16,
    &SPARSAM_TARGET::quantise,
    &SPARSAM_TARGET::largest,
    &SPARSAM_TARGET::round_floats,
    &SPARSAM_TARGET::multiply,
    8,
    &SPARSAM_TARGET::multiply_int4,
    nullptr,
    0,
    nullptr,
    nullptr,
};

}  // namespace sparsam::int8_rows
