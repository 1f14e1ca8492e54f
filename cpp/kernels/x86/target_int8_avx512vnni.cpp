// The row of int8 kernels for AVX-512 with VNNI, VBMI and VBMI2. Built with flags of its own; see
// cpp/README.md for what may be included here.
#define SPARSAM_TARGET avx512
#include "floats_avx512.hpp"
#include "int8_avx512vnni.hpp"

#include "int4_avx512vnni.hpp"

#include "int4_bitmask-inl.hpp"
#include "int4_slots-inl.hpp"
#include "int8_slots-inl.hpp"
#include "table.hpp"

namespace sparsam::int8_rows {

extern const Int8Kernels avx512vnni;
const Int8Kernels avx512vnni = {
    "avx512vnni",
    kAvx2 | kAvx512 | kVnni,
    32,
    64,
    &SPARSAM_TARGET::quantise,
    &SPARSAM_TARGET::largest,
    &SPARSAM_TARGET::round_floats,
    &SPARSAM_TARGET::multiply,
    16,
    &SPARSAM_TARGET::multiply_int4,
    &SPARSAM_TARGET::multiply_int4_bitmask,
    0,
    nullptr,
    nullptr,
};

}  // namespace sparsam::int8_rows
