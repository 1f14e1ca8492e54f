// The lanes of a group in slots, for any machine. Include after floats_generic.hpp.
#pragma once
#include "slot_lanes_any-inl.hpp"

namespace sparsam::generic {
namespace {

template <std::size_t kRows>
using SlotLanes = AnySlotLanes<kRows>;

}  // namespace
}  // namespace sparsam::generic
