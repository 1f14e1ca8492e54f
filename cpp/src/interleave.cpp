#include "sparsam/interleave.hpp"

#include <algorithm>

#include "chunks.hpp"
#include "sparsam/errors.hpp"
#include "sparsam/threads.hpp"

namespace sparsam {
namespace {

std::size_t volume_of(const Sizes3& sizes) { return sizes[0] * sizes[1] * sizes[2]; }

// to[i] = from[i % step * apart + i / step] for i < n.
void interleave_row(const float* from, std::size_t apart, std::size_t step, std::size_t n, float* to) {
  if (step == 1) {
    std::copy_n(from, n, to);
    return;
  }
  if (step == 2) {  // most strides; written so that compilers interleave vectors
    const float* const even = from;
    const float* const odd = from + apart;
    for (std::size_t i = 0; i < n / 2; ++i) {
      to[2 * i] = even[i];
      to[2 * i + 1] = odd[i];
    }
    if (n % 2 != 0) to[n - 1] = even[n / 2];
    return;
  }
  for (std::size_t phase = 0; phase < step; ++phase)
    for (std::size_t i = phase, k = 0; i < n; i += step, ++k) to[i] = from[phase * apart + k];
}

}  // namespace

void check(const Interleaving& g) {
  for (std::size_t axis = 0; axis < 3; ++axis) {
    const std::size_t step = g.stride[axis], outer = g.outer[axis];
    const std::size_t needed = step == 0 ? 0 : (outer + step - 1) / step;
    const std::size_t there = g.inner[axis] - std::min(g.inner[axis], g.offset[axis]);
    if (step == 0 || outer == 0 || needed > there)
      throw std::invalid_argument(
          expected("size", there, "at least " + std::to_string(needed), "pass all pixels of each phase"));
  }
}

void interleave(const Interleaving& g, const float* x, float* y) {
  const std::size_t whole = volume_of(g.inner), lines = g.outer[0] * g.outer[1];
  const std::size_t floats = lines * g.outer[2];
  // A task is some lines of a plane.
  const std::size_t each = std::max<std::size_t>(1, kSerialBelow / 16 / g.outer[2]);
  const std::size_t per_plane = (lines + each - 1) / each, tasks = g.planes * per_plane;
  auto one = [&](std::size_t, std::size_t task) {
    const std::size_t plane = task / per_plane, first = task % per_plane * each;
    const float* const phases = x + plane * volume_of(g.stride) * whole;
    for (std::size_t line = first; line < std::min(lines, first + each); ++line) {
      const std::size_t d = line / g.outer[1], h = line % g.outer[1];
      const std::size_t phase = (d % g.stride[0] * g.stride[1] + h % g.stride[1]) * g.stride[2];
      const std::size_t row = (g.offset[0] + d / g.stride[0]) * g.inner[1] + g.offset[1] + h / g.stride[1];
      interleave_row(phases + phase * whole + row * g.inner[2] + g.offset[2], whole, g.stride[2], g.outer[2],
                     y + plane * floats + line * g.outer[2]);
    }
  };
  for_each_task(tasks, worker_count(tasks, g.planes * floats >= kSerialBelow / 4), one);
}

}  // namespace sparsam
