// The row of int8 kernels for any machine. Built with flags of its own; see cpp/README.md
// for what may be included here.
#define SPARSAM_TARGET generic
#include "floats_generic.hpp"

#include "int4_any-inl.hpp"
#include "table.hpp"

namespace sparsam::int8_rows {

extern const Int8Kernels generic;
const Int8Kernels generic = {
    "generic",
    kNone,
    8,
    16,
    &SPARSAM_TARGET::quantise,
    &SPARSAM_TARGET::largest,
    &SPARSAM_TARGET::round_floats,
    &SPARSAM_TARGET::multiply,
    8,
    &SPARSAM_TARGET::multiply_int4,
    &SPARSAM_TARGET::multiply_int4_bitmask,
    0,
    nullptr,
    nullptr,
};

}  // namespace sparsam::int8_rows
