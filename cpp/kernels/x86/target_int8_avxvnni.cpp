// The row of int8 kernels for AVX2 with AVX-VNNI. Built with flags of its own; see cpp/README.md
// for what may be included here.
#define SPARSAM_TARGET avx2
#include "floats_avx2.hpp"
#include "int8_avxvnni.hpp"

#include "int8_slots-inl.hpp"
#include "table.hpp"

namespace sparsam::int8_rows {

extern const Int8Kernels avxvnni;
const Int8Kernels avxvnni = {
    "avxvnni",
    kAvx2 | kAvxVnni,
    8,
    16,
    &SPARSAM_TARGET::quantise,
    &SPARSAM_TARGET::largest,
    &SPARSAM_TARGET::round_floats,
    &SPARSAM_TARGET::multiply,
    0,
    nullptr,
    nullptr,
    0,
    nullptr,
    nullptr,
};

}  // namespace sparsam::int8_rows
