// The avx2 row. Built with AVX2 flags; see cpp/README.md for what may be included here.
#define SPARSAM_TARGET avx2
#include "floats_avx2.hpp"
#include "slot_lanes_avx2.hpp"
#include "vec_avx2.hpp"

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
    "avx2",
    "x86-64 with AVX2, FMA and BMI2 (Haswell, Zen and later)",
    kAvx2,
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
