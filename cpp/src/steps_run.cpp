// Calls of a list of steps: how they are cut, and who does what.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <thread>

#include "chunks.hpp"
#include "panel_tiles.hpp"
#include "ranges.hpp"
#include "sparsam/errors.hpp"
#include "sparsam/isa.hpp"
#include "sparsam/matmul.hpp"
#include "sparsam/steps.hpp"
#include "sparsam/threads.hpp"
#include "steps.hpp"
#include "table.hpp"

namespace sparsam {
namespace {

// Rows of a chunk for each thread: the buffers of 256 rows of a transformer's block of 384 columns are about
// 2 MB. And of a part: threads that share a chunk wait for the last one.
constexpr std::size_t kChunkRows = 256, kPartRows = 128;
// Products of float values take up to 64 rows at a time, and add up otherwise where few are left: chunks and
// parts of a multiple of that give the same bits as all rows at once. Sums of int8 and int4 values are exact.
constexpr std::size_t kRowsTogether = 64;
// A product of less than 4 rows takes nearly as long as one of 4.
constexpr std::size_t kLeastRows = 4;

std::size_t cut_up(std::size_t n, std::size_t step) { return (n + step - 1) / step; }
std::size_t multiple(std::size_t n, std::size_t of) { return cut_up(n, of) * of; }

// Parts of phases that threads take, each first the one that it took before, whose rows are in its cache. A
// part waits until all parts of the phase before are done; since phases are begun in order, these are done or
// a running thread works on them.
class StepParts {
 public:
  StepParts(std::size_t parts, std::size_t phases)
      : parts_(parts), taken_(new std::atomic<bool>[parts * phases]) {
    for (std::size_t i = 0; i < parts * phases; ++i) taken_[i].store(false, std::memory_order_relaxed);
  }

  std::size_t take(std::size_t phase) {
    std::size_t part = thread_number() % parts_;
    while (taken_[phase * parts_ + part].exchange(true, std::memory_order_relaxed))
      part = (part + 1) % parts_;
    return part;
  }
  // False if a part has failed. Who waits for long sleeps: another program has the other thread's processor,
  // and the system moves that thread to an idle one at once, to one that is busy with waiting not for long.
  bool wait(std::size_t phase) const {
    for (std::size_t tries = 0; done_.load(std::memory_order_acquire) < phase * parts_; ++tries) {
      if (failed_.load(std::memory_order_relaxed)) return false;
      if (tries > 10000) std::this_thread::sleep_for(std::chrono::microseconds(1));
    }
    return true;
  }
  void done() { done_.fetch_add(1, std::memory_order_release); }
  void fail() { failed_.store(true); }

 private:
  std::size_t parts_;
  std::unique_ptr<std::atomic<bool>[]> taken_;
  std::atomic<std::size_t> done_{0};
  std::atomic<bool> failed_{false};
};

}  // namespace

// The steps of one chunk.
struct Steps::Pass {
  const std::vector<std::size_t>& widths;
  const std::vector<const float*>& tensors;
  std::size_t sequences, positions;
  MaskView mask;  // of the chunk
  std::vector<float*> buffers;
  const StepKernels& kernel = kernels().steps;

  std::size_t rows() const { return sequences * positions; }
  float* at(std::size_t buffer, std::size_t row) const {
    return buffer == kNowhere ? nullptr : buffers[buffer] + row * widths[buffer];
  }
  const float* tensor(std::size_t t) const { return t == kNowhere ? nullptr : tensors[t]; }

  // One step of rows [begin, end).
  void run(const Step& s, std::size_t begin, std::size_t end) const {
    const std::size_t width = widths[s.to], n = end - begin;
    const float *const a = at(s.from[0], begin), *const b = at(s.from[1], begin);
    float* const y = at(s.to, begin);
    const Activation activation = activation_of(s.activation);
    switch (s.kind) {
      case StepKind::linear:
        linear(*s.form, a, n, tensor(s.bias), s.activation, y);
        return;
      case StepKind::attention:
        attend(s, begin, end);
        return;
      case StepKind::add:
        row_wise(n, width, [&](std::size_t i, std::size_t count) { kernel.add(a + i, b + i, count, y + i); });
        return;
      case StepKind::activate:
        row_wise(n, width,
                 [&](std::size_t i, std::size_t count) { kernel.activate(a + i, count, activation, y + i); });
        return;
      case StepKind::gate:
        row_wise(n, width, [&](std::size_t i, std::size_t count) {
          kernel.gate(a + i, b + i, count, activation, y + i);
        });
        return;
      case StepKind::rotary: {
        const std::size_t depth = width / s.heads;
        const float* const sin = at(s.from[2], begin);
        row_wise(n, width, [&](std::size_t i, std::size_t count) {
          const std::size_t angles = i / width * depth;
          kernel.rotary({count / width, s.heads, depth, a + i, b + angles, sin + angles, y + i});
        });
        return;
      }
      default: {
        float* const sum = at(s.sum, begin);
        const auto norm = s.kind == StepKind::layer_norm ? kernel.layer_norm : kernel.rms_norm;
        row_wise(n, width, [&](std::size_t i, std::size_t count) {
          norm({count / width, width, a + i, b == nullptr ? nullptr : b + i,
                sum == nullptr ? nullptr : sum + i, y + i, tensor(s.weight), tensor(s.bias), s.eps});
        });
      }
    }
  }

 private:
  // Whole sequences together, and a part of one by itself.
  void attend(const Step& s, std::size_t begin, std::size_t end) const {
    const std::size_t width = widths[s.to], depth = width / s.heads;
    const auto heads = [&](std::size_t buffer, std::size_t row) {
      return HeadsView{at(buffer, row), positions * width, depth, width};
    };
    while (begin < end) {
      const std::size_t sequence = begin / positions, from = begin % positions;
      const std::size_t whole = from == 0 ? (end - begin) / positions : 0;
      const std::size_t queries = whole != 0 ? positions : std::min(positions - from, end - begin);
      MaskView seen = s.masked ? mask : MaskView{};
      const std::size_t skipped = sequence * seen.sequence_stride + from * seen.stride;
      if (seen.kept != nullptr) seen.kept += skipped;
      if (seen.added != nullptr) seen.added += skipped;
      const std::size_t first = sequence * positions;
      attention({std::max<std::size_t>(1, whole), s.heads, queries, positions, depth},
                heads(s.from[0], begin), heads(s.from[1], first), heads(s.from[2], first), seen, s.scale,
                at(s.to, begin));
      begin += std::max<std::size_t>(1, whole) * queries;
    }
  }

  // body(first, count) for the numbers of whole rows.
  template <class Body>
  static void row_wise(std::size_t rows, std::size_t width, Body&& body) {
    if (width == 0) return;
    const std::size_t step = std::max<std::size_t>(1, (std::size_t{1} << 14) / width);
    const std::size_t tasks = cut_up(rows, step);
    const std::size_t workers = worker_count(tasks, rows * width * kRowWiseCost >= kSerialBelow);
    for_each_task(tasks, workers, [&](std::size_t, std::size_t task) {
      const std::size_t begin = task * step, end = std::min(rows, begin + step);
      body(begin * width, (end - begin) * width);
    });
  }
};

// Threads have chunks of their own unless some would wait long for others; else they share a chunk, if there
// are rows enough; else they share each step.
StepChunks Steps::chunks(std::size_t sequences, std::size_t positions) const {
  const std::size_t rows = sequences * positions;
  StepChunks c{sequences, positions, 1, sequences, 1, 0};
  if (!attends_) c = {rows, 1, 1, rows, 1, 0};
  if (rows == 0) return c;
  if (!exact_) c.together = kRowsTogether / std::gcd(c.positions, kRowsTogether);
  const auto waits = [](std::size_t all, std::size_t each, std::size_t workers) {
    return cut_up(all, each * workers) * each * workers > all + all / 8;
  };
  const auto of_rows = [&](std::size_t n) {
    return multiple(std::max<std::size_t>(1, n / c.positions), c.together);
  };
  const std::size_t workers = worker_count(rows, rows * work_ >= kSerialBelow);
  c.each = std::min(of_rows(kChunkRows), multiple(cut_up(c.sequences, workers), c.together));
  if (workers > 1 && !waits(c.sequences, c.each, workers)) {
    c.at_once = workers;
    return c;
  }
  c.each = std::min(c.sequences, of_rows(workers * kChunkRows));
  const std::size_t of_chunk = c.each * c.positions;
  const std::size_t parts = workers * cut_up(of_chunk, workers * kPartRows);
  const std::size_t part = multiple(cut_up(of_chunk, parts), exact_ ? 1 : kRowsTogether);
  if (workers > 1 && part >= kLeastRows && !waits(of_chunk, part, workers)) c.part = part;
  return c;
}

std::size_t Steps::scratch(std::size_t sequences, std::size_t positions) const {
  const StepChunks c = chunks(sequences, positions);
  return c.at_once * c.each * c.positions * layout(c).all + 15;  // 15 at most are before a cache line
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
    if (inputs_[i] && given[i] == nullptr)
      throw std::invalid_argument(expected("given", "no buffer " + std::to_string(i),
                                           "all buffers that steps read first", "pass its address"));
  if (call.tensors.size() < tensors_)
    throw std::invalid_argument(
        expected("tensors", call.tensors.size(), std::to_string(tensors_) + " addresses", "pass all"));
  if (call.sequences * call.positions == 0) return;

  StepChunks c = chunks(call.sequences, call.positions);
  const std::size_t before = reinterpret_cast<std::uintptr_t>(call.scratch) / sizeof(float) % 16;
  const std::size_t skipped = before == 0 ? 0 : 16 - before;
  const std::size_t room = call.floats < skipped ? 0 : call.floats - skipped;
  // Another thread may have changed the number of threads since scratch() was asked.
  if (c.each * c.positions * layout(c).all > room) c.part = 0;
  const std::vector<std::size_t>& columns = layout(c).columns;
  const std::size_t of_one = c.positions * layout(c).all;
  if (c.each * of_one > room) c.each = room / of_one / c.together * c.together;
  if (c.each == 0)
    throw std::invalid_argument(expected("scratch", call.floats, "more floats", "ask scratch() how many"));
  const std::size_t of_chunk = c.each * of_one, chunks = cut_up(c.sequences, c.each);
  const std::size_t workers = std::min({c.at_once, chunks, of_chunk == 0 ? chunks : room / of_chunk});
  for_each_task(chunks, workers, [&](std::size_t worker, std::size_t chunk) {
    const std::size_t first = chunk * c.each, here = std::min(c.each, c.sequences - first);
    Pass pass{widths_, call.tensors, here, c.positions, call.mask, given};
    float* const own = call.scratch + skipped + worker * of_chunk;
    for (std::size_t i = 0; i < widths_.size(); ++i)
      pass.buffers[i] = given[i] != nullptr ? given[i] + first * c.positions * widths_[i]
                                            : own + columns[i] * here * c.positions;
    if (pass.mask.kept != nullptr) pass.mask.kept += first * pass.mask.sequence_stride;
    if (pass.mask.added != nullptr) pass.mask.added += first * pass.mask.sequence_stride;
    run(pass, c.part);
  });
}

// Threads share a chunk where they have a part of it each.
void Steps::run(const Pass& pass, std::size_t part) const {
  const std::size_t rows = pass.rows();
  if (part == 0 || part >= rows) {
    for (const Step& step : steps_) pass.run(step, 0, rows);
    return;
  }
  const std::size_t parts = cut_up(rows, part), phases = phases_.size() - 1;
  StepParts all(parts, phases);
  for_each_task(parts * phases, worker_count(parts, true), [&](std::size_t, std::size_t task) {
    const std::size_t phase = task / parts;
    if (!all.wait(phase)) return;
    const std::size_t begin = all.take(phase) * part, end = std::min(rows, begin + part);
    try {
      for (std::size_t i = phases_[phase]; i < phases_[phase + 1]; ++i) pass.run(steps_[i], begin, end);
    } catch (...) {
      all.fail();
      throw;
    }
    all.done();
  });
}

}  // namespace sparsam
