// The matmul kernel over slots, written once over SlotLanes<8> and SlotLanes<16>. Included by matmul-inl.hpp.
#pragma once

namespace sparsam::SPARSAM_TARGET {
namespace {

constexpr std::size_t kSlotPitch = kSlotBlock + kMaxLanes;  // rows, and room for lanes without a row

// How a step reads its values and adds to sums, and whether values are prefetched. If only used slots have a
// value, values are expanded:
struct UsedSlots {
  static constexpr bool kFetched = true;
  template <class Step, class Value>
  static auto weights(const Step& now, const Value*& p) {
    const auto w = now.weights(p);
    p += now.count();
    return w;
  }
  template <class Step, class Reg>
  static Reg fma(const Step& now, const Reg& w, const float* x, const Reg& sum) {
    return now.fma(w, x, sum);
  }
};
// If all slots have a value, a 0 adds nothing as long as x is finite. Prefetching costs a tenth of the time
// if the values are in a cache, and saves a fiftieth if they are not, since hardware prefetches too:
template <std::size_t kRows>
struct FiniteSlots {
  static constexpr bool kFetched = false;
  template <class Step, class Value>
  static auto weights(const Step&, const Value*& p) {
    const auto w = Step::all_weights(p);
    p += kRows;
    return w;
  }
  template <class Step, class Reg>
  static Reg fma(const Step& now, const Reg& w, const float* x, const Reg& sum) {
    return now.fma_all(w, x, sum);
  }
};
// If x is not finite:
template <std::size_t kRows>
struct AllSlots : FiniteSlots<kRows> {
  template <class Step, class Reg>
  static Reg fma(const Step& now, const Reg& w, const float* x, const Reg& sum) {
    return now.fma(w, x, sum);
  }
};

// The sums of a group for kBatch rows of x, to sums[t * kSlotPitch + row in the block]. With one row, every
// other step adds to a second set of sums, and so on, to hide their latency. As many values are prefetched as
// kAtOnce steps can have.
template <std::size_t kRows, class Slots, class Value, std::size_t kBatch>
SPARSAM_INLINE void slot_group(const SlotView& w, std::size_t g, const float* const* x, float* sums) {
  using Lanes = SlotLanes<kRows>;
  constexpr std::size_t kChains = kRows != kLanes ? 1 : kBatch == 1 ? 4 : kBatch <= 3 ? 2 : 1;
  constexpr std::size_t kAhead = 2048, kAtOnce = kBatch <= 4 ? 4 : 2;  // more would not fit the registers
  constexpr std::size_t kLines = (kAtOnce * kRows * sizeof(Value) + 63) / 64;
  const SlotStart* const group = w.groups + g;
  const Value* p = static_cast<const Value*>(w.values) + group[0].value;
  std::size_t start = 0;
  const typename Lanes::Constants constants;
  typename Lanes::Reg sum[kBatch][kChains];
  for (auto& of_one : sum)
    for (auto& chain : of_one) chain = Lanes::zero();
  const auto add = [&](std::size_t step, std::size_t chain) __attribute__((always_inline)) {
    start += w.starts[step];
    SPARSAM_CHECK(start + (w.cols < kRows ? 0 : kRows) <= w.cols);
    const typename Lanes::Step now(constants, w, step);
    const auto weights = Slots::weights(now, p);
#pragma GCC unroll 8
    for (std::size_t t = 0; t < kBatch; ++t)
      sum[t][chain] = Slots::fma(now, weights, x[t] + start, sum[t][chain]);
  };
  std::size_t step = group[0].step;
  const std::size_t end = group[1].step, fours = step + (end - step) / kAtOnce * kAtOnce;
  for (; step != fours; step += kAtOnce) {
    if constexpr (Slots::kFetched)
#pragma GCC unroll 8
      for (std::size_t line = 0; line < kLines; ++line)
        __builtin_prefetch(reinterpret_cast<const char*>(p) + kAhead + 64 * line);
#pragma GCC unroll 4
    for (std::size_t i = 0; i < kAtOnce; ++i) add(step + i, i % kChains);
  }
  for (; step != end; ++step) add(step, 0);
  SPARSAM_CHECK(p == static_cast<const Value*>(w.values) + group[1].value);
  const std::uint8_t* const row = w.order + g * kRows;
#pragma GCC unroll 8
  for (std::size_t t = 0; t < kBatch; ++t) {
    typename Lanes::Reg total = sum[t][0];
    for (std::size_t chain = 1; chain < kChains; ++chain) total = Lanes::add(total, sum[t][chain]);
    float lanes[kRows];
    Lanes::store(lanes, total);
    for (std::size_t i = 0; i < kRows; ++i) sums[t * kSlotPitch + row[i]] = lanes[i];
  }
}

// The sums of a block, row by row of x, to y.
template <class Y>
void finish_slots(const float* sums, std::size_t first, std::size_t rows, std::size_t batch,
                  Epilogue epilogue, Y* y, std::size_t y_stride) {
  for (std::size_t t = 0; t < batch; ++t)
    for (std::size_t m = 0; m < rows; m += kLanes) {
      const std::size_t count = rows - m < kLanes ? rows - m : kLanes;
      const auto out =
          finish_rows(Floats::load_partial(sums + t * kSlotPitch + m, count), epilogue, first + m, count);
      store_y(y + t * y_stride + first + m, out, count);
    }
}

template <std::size_t kRows, class Slots, class Value, std::size_t kBatch>
void slot_block(const SlotView& w, std::size_t block, const float* x, std::size_t x_stride, std::size_t batch,
                float* sums) {
  const std::size_t first = block * kSlotBlock,
                    end = first + kSlotBlock < w.rows ? first + kSlotBlock : w.rows;
  const float* of[kBatch];  // the last row is repeated if there are fewer than kBatch
  for (std::size_t t = 0; t < kBatch; ++t) of[t] = x + (t < batch ? t : batch - 1) * x_stride;
  for (std::size_t g = first / kRows; g < (end + kRows - 1) / kRows; ++g)
    slot_group<kRows, Slots, Value, kBatch>(w, g, of, sums);
}

// One row of x after the other, for rare cases.
template <std::size_t kRows, class Slots, class Value>
void slot_each(const SlotView& w, std::size_t block, const float* x, std::size_t x_stride, std::size_t batch,
               float* sums) {
  for (std::size_t t = 0; t < batch; ++t)
    slot_block<kRows, Slots, Value, 1>(w, block, x + t * x_stride, x_stride, 1, sums + t * kSlotPitch);
}

// As many rows of x at once as there are, if registers hold their sums.
template <class Slots, class Value>
void slot_batch(const SlotView& w, std::size_t block, const float* x, std::size_t x_stride, std::size_t batch,
                float* sums) {
  if constexpr (!Floats::kEightSums) {
    slot_each<kLanes, Slots, Value>(w, block, x, x_stride, batch, sums);
  } else {
    if (batch == 1) slot_block<kLanes, Slots, Value, 1>(w, block, x, x_stride, batch, sums);
    if (batch == 2) slot_block<kLanes, Slots, Value, 2>(w, block, x, x_stride, batch, sums);
    if (batch == 3) slot_block<kLanes, Slots, Value, 3>(w, block, x, x_stride, batch, sums);
    if (batch == 4) slot_block<kLanes, Slots, Value, 4>(w, block, x, x_stride, batch, sums);
    if (batch == 5 || batch == 6) slot_block<kLanes, Slots, Value, 6>(w, block, x, x_stride, batch, sums);
    if (batch > 6) slot_block<kLanes, Slots, Value, 8>(w, block, x, x_stride, batch, sums);
  }
}

template <class Value>
void slots(const SlotView& w, std::size_t block, const float* x, std::size_t x_stride, std::size_t batch,
           bool finite, Epilogue epilogue, Output y) {
  constexpr std::size_t kOthers = kLanes == 8 ? 16 : 8;  // of a form made for another instruction set
  SPARSAM_CHECK(block * kSlotBlock < w.rows && batch >= 1 && batch <= kSlotBatch);
  alignas(64) float sums[kSlotBatch * kSlotPitch];
  if (w.depth == kOthers && w.full)
    slot_each<kOthers, AllSlots<kOthers>, Value>(w, block, x, x_stride, batch, sums);
  else if (w.depth == kOthers)
    slot_each<kOthers, UsedSlots, Value>(w, block, x, x_stride, batch, sums);
  else if (!w.full)
    slot_batch<UsedSlots, Value>(w, block, x, x_stride, batch, sums);
  else if (finite)
    slot_batch<FiniteSlots<kLanes>, Value>(w, block, x, x_stride, batch, sums);
  else
    slot_each<kLanes, AllSlots<kLanes>, Value>(w, block, x, x_stride, batch, sums);
  const std::size_t first = block * kSlotBlock,
                    rows = w.rows - first < kSlotBlock ? w.rows - first : kSlotBlock;
  if (y.narrow)
    finish_slots(sums, first, rows, batch, epilogue, static_cast<Bfloat*>(y.data), y.stride);
  else
    finish_slots(sums, first, rows, batch, epilogue, static_cast<float*>(y.data), y.stride);
}

}  // namespace
}  // namespace sparsam::SPARSAM_TARGET
