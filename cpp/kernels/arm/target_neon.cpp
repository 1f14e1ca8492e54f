// The neon row. Every AArch64 machine has NEON, so it needs no flags; see cpp/README.md for what may be
// included here.
#define SPARSAM_TARGET neon
#include "floats_neon.hpp"
#include "slot_lanes_neon.hpp"
#include "vec_neon.hpp"

#include "attention-inl.hpp"
#include "matmul-inl.hpp"
#include "moments-inl.hpp"
#include "reconstruction-inl.hpp"
#include "recurrent-inl.hpp"
#include "rotary-inl.hpp"
#include "selection-inl.hpp"

namespace sparsam::SPARSAM_TARGET {

extern const KernelTable table;
const KernelTable table = {
    "neon",
    "AArch64 with Advanced SIMD, as every such machine has",
    kNeon,
    kSelectionKernels<std::uint16_t>,
    kSelectionKernels<std::uint32_t>,
    kSelectionKernels<std::uint64_t>,
    kMatmulKernels,
    kReconstructionKernels,
    kMomentKernels,
    kRecurrentKernels,
    kAttentionKernels,
    kStepKernels,
};

}  // namespace sparsam::SPARSAM_TARGET
