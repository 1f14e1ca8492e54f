// The row of int8 kernels for AVX2. Built with flags of its own; see cpp/README.md
// for what may be included here.
#define SPARSAM_TARGET avx2
#include "floats_avx2.hpp"
#include "int8_avx2.hpp"
#include "int8_quads_avx2.hpp"

#include "int4_avx2.hpp"

#include "int4_slots-inl.hpp"
#include "int8_quads-inl.hpp"
#include "int8_slots-inl.hpp"
#include "table.hpp"

namespace sparsam::int8_rows {

extern const Int8Kernels avx2;
const Int8Kernels avx2 = {
    "avx2",
    kAvx2,
    8,
    16,
    &SPARSAM_TARGET::quantise,
    &SPARSAM_TARGET::largest,
    &SPARSAM_TARGET::round_floats,
    &SPARSAM_TARGET::multiply,
    8,
    &SPARSAM_TARGET::multiply_int4,
    nullptr,
    32,
    &SPARSAM_TARGET::make_tile,
    &SPARSAM_TARGET::multiply_quads,
};

}  // namespace sparsam::int8_rows
