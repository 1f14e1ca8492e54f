#include "sparsam/steps.hpp"

#include <algorithm>
#include <numeric>
#include <stdexcept>

#include "chunks.hpp"
#include "panel_tiles.hpp"
#include "sparsam/errors.hpp"
#include "sparsam/isa.hpp"
#include "sparsam/matmul.hpp"
#include "sparsam/memory.hpp"
#include "sparsam/threads.hpp"
#include "steps.hpp"
#include "table.hpp"

namespace sparsam {
namespace {

// Rows of a chunk: the buffers of 256 rows of a transformer's block of 384 columns are about 2 MB.
constexpr std::size_t kChunkRows = 256;
// Products of float values take up to 64 rows at a time, and add up otherwise where few are left: chunks of a
// multiple of that give the same bits as all rows at once. Sums of int8 and int4 values are exact.
constexpr std::size_t kRowsTogether = 64;
// Multiplications that take as long as one number of a row-wise step.
constexpr std::size_t kRowWiseCost = 4;

bool is_norm(StepKind kind) { return kind == StepKind::layer_norm || kind == StepKind::rms_norm; }

[[noreturn]] void refuse(const Step& step, std::size_t number, const std::string& got,
                         const std::string& wanted, const std::string& action) {
  throw std::invalid_argument(
      expected("step " + std::to_string(number) + " (" + name_of(step.kind) + ")", got, wanted, action));
}

std::string columns_text(std::size_t n) { return std::to_string(n) + " columns"; }

// The steps of one chunk.
struct StepsPass {
  std::size_t sequences, positions;
  std::vector<float*> buffers;
  const std::vector<std::size_t>& widths;
  const std::vector<const float*>& tensors;
  MaskView mask;  // of the chunk
  const StepKernels& kernel = kernels().steps;

  std::size_t rows() const { return sequences * positions; }
  float* at(std::size_t buffer) const { return buffer == kNowhere ? nullptr : buffers[buffer]; }
  const float* tensor(std::size_t t) const { return t == kNowhere ? nullptr : tensors[t]; }

  void run(const Step& s) const {
    const std::size_t width = widths[s.to];
    const float *const a = at(s.from[0]), *const b = at(s.from[1]);
    float* const y = at(s.to);
    const Activation activation = activation_of(s.activation);
    switch (s.kind) {
      case StepKind::linear:
        linear(*s.form, a, rows(), tensor(s.bias), s.activation, y);
        return;
      case StepKind::attention:
        attend(s, width);
        return;
      case StepKind::add:
        for_rows(width, [&](std::size_t i, std::size_t n) { kernel.add(a + i, b + i, n, y + i); });
        return;
      case StepKind::activate:
        for_rows(width, [&](std::size_t i, std::size_t n) { kernel.activate(a + i, n, activation, y + i); });
        return;
      case StepKind::gate:
        for_rows(width,
                 [&](std::size_t i, std::size_t n) { kernel.gate(a + i, b + i, n, activation, y + i); });
        return;
      default: {
        float* const sum = at(s.sum);
        const auto norm = s.kind == StepKind::layer_norm ? kernel.layer_norm : kernel.rms_norm;
        for_rows(width, [&](std::size_t i, std::size_t n) {
          norm({n / width, width, a + i, b == nullptr ? nullptr : b + i, sum == nullptr ? nullptr : sum + i,
                y + i, tensor(s.weight), tensor(s.bias), s.eps});
        });
      }
    }
  }

 private:
  void attend(const Step& s, std::size_t width) const {
    const std::size_t depth = width / s.heads;
    const auto heads = [&](std::size_t buffer) {
      return HeadsView{at(buffer), positions * width, depth, width};
    };
    attention({sequences, s.heads, positions, positions, depth}, heads(s.from[0]), heads(s.from[1]),
              heads(s.from[2]), s.masked ? mask : MaskView{}, s.scale, at(s.to));
  }

  // body(first, count) for numbers of whole rows.
  template <class Body>
  void for_rows(std::size_t width, Body&& body) const {
    if (width == 0) return;
    const std::size_t step = std::max<std::size_t>(1, (std::size_t{1} << 14) / width);
    const std::size_t tasks = (rows() + step - 1) / step;
    const std::size_t workers = worker_count(tasks, rows() * width * kRowWiseCost >= kSerialBelow);
    for_each_task(tasks, workers, [&](std::size_t, std::size_t task) {
      const std::size_t begin = task * step, end = std::min(rows(), begin + step);
      body(begin * width, (end - begin) * width);
    });
  }
};

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
  }
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

// Gives buffers that are in use at the same time different columns of scratch: each, in the order of their
// first use, the first gap that is wide enough.
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
  std::vector<std::size_t> order(widths_.size()), placed;
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return uses[a].first < uses[b].first; });
  columns_.assign(widths_.size(), kNowhere);
  const auto end_of = [&](std::size_t buffer) {
    return columns_[buffer] + (widths_[buffer] + kAlign - 1) / kAlign * kAlign;
  };
  for (const std::size_t buffer : order) {  // `placed` is sorted by columns
    if (uses[buffer].input) continue;
    std::size_t at = 0;
    if (uses[buffer].first == kNowhere) {  // not used at all
      columns_[buffer] = 0;
      continue;
    }
    for (const std::size_t other : placed) {
      const bool together = uses[other].first <= uses[buffer].last && uses[buffer].first <= uses[other].last;
      if (together && columns_[other] < at + widths_[buffer]) at = std::max(at, end_of(other));
    }
    columns_[buffer] = at;
    all_columns_ = std::max(all_columns_, end_of(buffer));
    placed.insert(std::upper_bound(placed.begin(), placed.end(), buffer,
                                   [&](std::size_t a, std::size_t b) { return columns_[a] < columns_[b]; }),
                  buffer);
  }
}

StepChunks Steps::chunks(std::size_t sequences, std::size_t positions) const {
  StepChunks c{sequences, positions, 1, sequences, 1};
  if (!attends_) c = {sequences * positions, 1, 1, sequences * positions, 1};
  if (!exact_) c.together = kRowsTogether / std::gcd(c.positions, kRowsTogether);
  const std::size_t together = c.together;
  const auto cut = [&](std::size_t threads) {  // a chunk for this number of threads
    const std::size_t wanted =
        std::max<std::size_t>(1, kChunkRows * threads / std::max<std::size_t>(1, c.positions));
    return (wanted + together - 1) / together * together;
  };
  const std::size_t rows = sequences * positions;
  const std::size_t workers = worker_count(c.sequences, rows * work_ >= kSerialBelow);
  const std::size_t fair = ((c.sequences + workers - 1) / workers + together - 1) / together * together;
  const std::size_t own = std::max<std::size_t>(1, std::min(cut(1), fair));
  const std::size_t rounds = (c.sequences + own * workers - 1) / (own * workers);
  // Threads have chunks of their own unless some would wait too long for others.
  if (workers > 1 && rounds * own * workers * 8 <= c.sequences * 9) {
    c.each = own;
    c.workers = workers;
  } else {
    c.each = std::min(c.sequences, cut(workers));
  }
  return c;
}

std::size_t Steps::scratch(std::size_t sequences, std::size_t positions) const {
  const StepChunks c = chunks(sequences, positions);
  return c.workers * c.each * c.positions * all_columns_ + 15;  // as long as lines, from the first one on
}

void Steps::run(const StepsCall& call) const {
  std::vector<float*> given(widths_.size(), nullptr);
  for (const auto& [buffer, data] : call.given) {
    if (buffer >= widths_.size())
      throw std::invalid_argument(expected("given", "buffer " + std::to_string(buffer),
                                           "one of " + std::to_string(widths_.size()), "pass its number"));
    given[buffer] = data;
  }
  for (std::size_t i = 0; i < widths_.size(); ++i)
    if (columns_[i] == kNowhere && given[i] == nullptr)
      throw std::invalid_argument(expected("given", "no buffer " + std::to_string(i),
                                           "all buffers that steps read first", "pass its address"));
  if (call.tensors.size() < tensors_)
    throw std::invalid_argument(
        expected("tensors", call.tensors.size(), std::to_string(tensors_) + " addresses", "pass all"));
  if (call.sequences * call.positions == 0) return;

  StepChunks c = chunks(call.sequences, call.positions);
  const auto before = reinterpret_cast<std::uintptr_t>(call.scratch) / sizeof(float) % 16;
  const std::size_t skipped = before == 0 ? 0 : 16 - before;
  const std::size_t room = call.floats < skipped ? 0 : call.floats - skipped;
  const std::size_t of_one = c.positions * all_columns_;
  if (c.each * of_one > room) c.each = room / of_one / c.together * c.together;
  if (c.each == 0)
    throw std::invalid_argument(expected("scratch", call.floats, "more floats", "ask scratch() how many"));
  const std::size_t of_chunk = c.each * of_one;
  if (of_chunk != 0) c.workers = std::min(c.workers, room / of_chunk);
  const std::size_t tasks = (c.sequences + c.each - 1) / c.each;
  for_each_task(tasks, std::min(c.workers, tasks), [&](std::size_t worker, std::size_t task) {
    const std::size_t first = task * c.each, here = std::min(c.each, c.sequences - first);
    float* const own = call.scratch + skipped + worker * of_chunk;
    StepsPass pass{here, c.positions, given, widths_, call.tensors, call.mask};
    for (std::size_t i = 0; i < widths_.size(); ++i) {
      if (given[i] != nullptr)
        pass.buffers[i] += first * c.positions * widths_[i];
      else
        pass.buffers[i] = own + columns_[i] * here * c.positions;
    }
    if (pass.mask.kept != nullptr) pass.mask.kept += first * pass.mask.sequence_stride;
    if (pass.mask.added != nullptr) pass.mask.added += first * pass.mask.sequence_stride;
    for (const Step& step : steps_) pass.run(step);
  });
}

}  // namespace sparsam
