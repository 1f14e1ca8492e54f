// A module as a list of steps over buffers, run in one call: products with packed weights, attention, norms
// and what is between them.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "sparsam/attention.hpp"
#include "sparsam/forms.hpp"

namespace sparsam {

enum class StepKind : std::uint8_t { linear, attention, add, layer_norm, rms_norm, activate, gate, rotary };

inline const char* name_of(StepKind kind) {
  constexpr std::array<const char*, 8> kNames = {"linear",   "attention", "add",  "layer_norm",
                                                 "rms_norm", "activate",  "gate", "rotary"};
  return kNames[static_cast<std::size_t>(kind)];
}

// Stands for no buffer and for no tensor.
constexpr std::size_t kNowhere = SIZE_MAX;

// Buffers and tensors are named by their numbers; a kind has what is said of it, and nothing else.
struct Step {
  StepKind kind;
  // linear, activate: x. add: a, b. gate: g, u. attention: q, k, v. rotary: x, cos, sin. Norms: a, and b if x
  // = a + b, else none.
  std::array<std::size_t, 3> from = {kNowhere, kNowhere, kNowhere};
  std::size_t to = kNowhere;                       // may be one of `from` but in linear and attention
  std::size_t sum = kNowhere;                      // of norms: receives a + b
  std::size_t weight = kNowhere, bias = kNowhere;  // tensors of norms; bias of linear
  FormPtr form = nullptr;                          // of linear
  std::string activation = {};                     // of linear, activate, gate: as linear() takes it
  std::size_t heads = 1;                           // of attention, rotary: each an equal part of the width
  float scale = 1, eps = 0;                        // of attention; of norms
  bool masked = false;                             // of attention: whether the call's mask applies
};

// What a call brings. Buffers are [sequences * positions x width], float32, contiguous.
struct StepsCall {
  std::size_t sequences, positions;
  std::vector<std::pair<std::size_t, float*>> given;  // inputs and outputs; other buffers live in scratch
  std::vector<const float*> tensors;                  // vectors of float32
  MaskView mask;                                      // of the steps that are masked
  float* scratch;
  std::size_t floats;  // of scratch
};

// How a call is cut into chunks of whole sequences, which go through all steps one after the other, so that
// buffers stay in the cache.
struct StepChunks {
  std::size_t sequences, positions;  // in all; rows are sequences of their own where there is no attention
  std::size_t together;              // a chunk has a multiple of so many sequences, or all
  std::size_t each;                  // sequences of a chunk
  std::size_t at_once;               // chunks, each on a thread of its own
  std::size_t part;                  // rows of a chunk that a thread takes where several share it; else 0
};

// The columns of scratch at which buffers begin, and how many there are in all.
struct StepLayout {
  std::vector<std::size_t> columns;
  std::size_t all = 0;
};

// Immutable. Results do not depend on the number of threads. Those of a sequence do not depend on what else
// is in the call where values are int8 and int4; products of float values add up in an order of their own
// where few rows are left of a batch.
class Steps {
 public:
  // widths[i]: columns of buffer i. Throws std::invalid_argument where steps do not fit.
  Steps(std::vector<std::size_t> widths, std::vector<Step> steps);

  // Floats of scratch with which a call runs on as many threads as there are now.
  std::size_t scratch(std::size_t sequences, std::size_t positions) const;

  // Throws std::invalid_argument where something is missing: a buffer that is read first, a tensor, room.
  void run(const StepsCall& call) const;

 private:
  static constexpr std::size_t kRowWiseCost = 4;  // multiplications that take as long as a row-wise number

  void check(const Step& step, std::size_t number) const;
  void place();
  StepChunks chunks(std::size_t sequences, std::size_t positions) const;
  const StepLayout& layout(const StepChunks& c) const { return c.part == 0 ? packed_ : apart_; }
  struct Pass;
  void run(const Pass& pass, std::size_t part) const;

  std::vector<std::size_t> widths_;
  std::vector<Step> steps_;
  std::vector<std::size_t> phases_;  // first steps, before and after attention, and one past the last
  std::vector<bool> inputs_;
  StepLayout packed_, apart_;
  std::size_t tensors_ = 0, work_ = 0;  // work_: multiplications a row, about
  bool attends_ = false;
  bool exact_ = true;  // no product is of float values
};

}  // namespace sparsam
