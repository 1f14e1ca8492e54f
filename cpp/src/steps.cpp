#include "sparsam/steps.hpp"

#include <algorithm>
#include <numeric>
#include <stdexcept>

#include "panel_tiles.hpp"
#include "sparsam/errors.hpp"

namespace sparsam {
namespace {

[[noreturn]] void refuse(const Step& step, std::size_t number, const std::string& got,
                         const std::string& wanted, const std::string& action) {
  throw std::invalid_argument(
      expected("step " + std::to_string(number) + " (" + name_of(step.kind) + ")", got, wanted, action));
}

std::string columns_text(std::size_t n) { return std::to_string(n) + " columns"; }

}  // namespace

Steps::Steps(std::vector<std::size_t> widths, std::vector<Step> steps)
    : widths_(std::move(widths)), steps_(std::move(steps)) {
  for (std::size_t i = 0; i < steps_.size(); ++i) {
    const Step& s = steps_[i];
    check(s, i);
    for (const std::size_t t : {s.weight, s.bias})
      if (t != kNowhere) tensors_ = std::max(tensors_, t + 1);
    attends_ = attends_ || s.kind == StepKind::attention;
    exact_ = exact_ && (s.form == nullptr || s.form->dtype() == DType::i8 || s.form->dtype() == DType::i4);
    work_ += s.kind == StepKind::linear ? s.form->nnz() : kRowWiseCost * widths_[s.to];
    if (i == 0 || s.kind == StepKind::attention || steps_[i - 1].kind == StepKind::attention)
      phases_.push_back(i);
  }
  phases_.push_back(steps_.size());
  place();
}

void Steps::check(const Step& s, std::size_t number) const {
  const auto known = [&](std::size_t buffer) {
    if (buffer >= widths_.size())
      refuse(s, number, "buffer " + std::to_string(buffer), "one of " + std::to_string(widths_.size()),
             "give widths of all buffers");
  };
  for (const std::size_t buffer : {s.from[0], s.to}) known(buffer);
  for (const std::size_t buffer : {s.from[1], s.from[2], s.sum})
    if (buffer != kNowhere) known(buffer);
  activation_of(s.activation);
  const std::size_t width = widths_[s.to];
  if (s.kind == StepKind::linear) {
    if (s.form->taps().count() != 0)
      refuse(s, number, "that of a convolution", "the weight of a linear layer", "pass another");
    if (widths_[s.from[0]] != s.form->cols())
      refuse(s, number, "x of " + columns_text(widths_[s.from[0]]), std::to_string(s.form->cols()),
             "pass a buffer as wide as the weight");
    if (width != s.form->rows())
      refuse(s, number, "y of " + columns_text(width), std::to_string(s.form->rows()),
             "pass a buffer that has a column for each row of the weight");
  } else if (s.kind == StepKind::rotary) {
    const std::size_t cos = widths_[s.from[1]], sin = widths_[s.from[2]];
    if (widths_[s.from[0]] != width || cos != sin || s.heads == 0 || cos * s.heads != width || cos % 2 != 0)
      refuse(s, number,
             std::to_string(s.heads) + " heads in " + columns_text(width) + " and angles in " +
                 std::to_string(cos) + " and " + std::to_string(sin),
             "angles for each column of a head, an even number", "pass such buffers");
  } else {
    for (const std::size_t buffer : {s.from[0], s.from[1], s.from[2], s.sum})
      if (buffer != kNowhere && widths_[buffer] != width)
        refuse(s, number, columns_text(widths_[buffer]) + " and " + std::to_string(width),
               "buffers of one width", "pass such");
  }
  if (s.kind == StepKind::attention &&
      (s.heads == 0 || width % s.heads != 0 || width / s.heads % kMaxLanes != 0))
    refuse(s, number, std::to_string(s.heads) + " heads of " + columns_text(width),
           "heads whose depth is a multiple of 16", "pad the heads");
  if (s.kind == StepKind::linear || s.kind == StepKind::attention) {
    if (std::find(s.from.begin(), s.from.end(), s.to) != s.from.end())
      refuse(s, number, "an operand", "y in a buffer of its own", "use another buffer");
  } else if (s.sum == s.to) {
    refuse(s, number, "y", "the sum in a buffer of its own", "use another buffer");
  }
}

// Gives buffers columns of scratch: those that are in use at the same time different ones, each, in the order
// of their first use, the first gap that is wide enough; and where threads share a chunk, and one may be
// steps ahead of the other, each its own.
void Steps::place() {
  constexpr std::size_t kAlign = 16;  // floats of a cache line
  struct Use {
    std::size_t first = kNowhere, last = 0;
    bool input = false;
  };
  std::vector<Use> uses(widths_.size());
  for (std::size_t i = 0; i < steps_.size(); ++i) {
    const Step& s = steps_[i];
    for (const std::size_t buffer : {s.from[0], s.from[1], s.from[2]})
      if (buffer != kNowhere) {
        Use& use = uses[buffer];
        use.input = use.input || use.first == kNowhere;
        use.last = i;
      }
    for (const std::size_t buffer : {s.to, s.sum})
      if (buffer != kNowhere) uses[buffer] = {std::min(uses[buffer].first, i), i, uses[buffer].input};
  }
  std::vector<std::size_t> order, placed;
  for (std::size_t buffer = 0; buffer < widths_.size(); ++buffer) {
    inputs_.push_back(uses[buffer].input);
    if (uses[buffer].first != kNowhere && !uses[buffer].input) order.push_back(buffer);
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return uses[a].first < uses[b].first; });
  packed_.columns.assign(widths_.size(), 0);
  apart_.columns.assign(widths_.size(), 0);
  for (const std::size_t buffer : order) {  // `placed` is sorted by columns
    const std::size_t width = (widths_[buffer] + kAlign - 1) / kAlign * kAlign;
    apart_.columns[buffer] = apart_.all;
    apart_.all += width;
    std::size_t at = 0;
    for (const std::size_t other : placed) {
      const bool together = uses[other].first <= uses[buffer].last && uses[buffer].first <= uses[other].last;
      const std::size_t begin = packed_.columns[other],
                        end = begin + (widths_[other] + kAlign - 1) / kAlign * kAlign;
      if (together && begin < at + width) at = std::max(at, end);
    }
    packed_.columns[buffer] = at;
    packed_.all = std::max(packed_.all, at + width);
    placed.insert(std::upper_bound(
                      placed.begin(), placed.end(), buffer,
                      [&](std::size_t a, std::size_t b) { return packed_.columns[a] < packed_.columns[b]; }),
                  buffer);
  }
}

}  // namespace sparsam
