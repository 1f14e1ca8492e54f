// The avx512 row. Built with AVX-512 flags; see cpp/README.md for what may be included here.
#define SPARSAM_TARGET avx512
#include "floats_avx512.hpp"
#include "slot_lanes_avx512.hpp"
#include "vec_avx512.hpp"

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
    "avx512",
    "x86-64 with AVX-512 F, BW, VL, DQ and CD (Skylake-X, Zen 4 and later)",
    kAvx2 | kAvx512,
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
