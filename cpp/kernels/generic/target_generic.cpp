// The generic row. Built with baseline flags; see cpp/README.md for what may be included here.
#define SPARSAM_TARGET generic
#include "floats_generic.hpp"
#include "slot_lanes_generic.hpp"
#include "vec_generic.hpp"

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
    "generic",
    "any machine, what the compiler makes of plain loops",
    kNone,
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
