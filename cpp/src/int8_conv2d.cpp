// Convolutions with int8 values: images are rounded to bytes, and windows of them multiplied as rows of x.
#include <algorithm>
#include <array>

#include "int8_images.hpp"
#include "panel_tiles.hpp"
#include "sparsam/isa.hpp"
#include "sparsam/memory.hpp"
#include "table.hpp"

namespace sparsam {
namespace {

constexpr std::size_t kPositions = 64;          // of a tile
constexpr std::size_t kRoundedBytes = 4 << 20;  // rounded at a time: they stay in the caches

// The images of a 1 x 1 convolution are one row of pixels each.
Conv2d flattened(Conv2d c) {
  if (c.kernel_h * c.kernel_w * c.stride_h * c.stride_w == 1 && c.pad_h + c.pad_w == 0) {
    c.width *= c.height;
    c.height = 1;
  }
  return c;
}

// Tiles of so many positions that each thread has some.
std::size_t tile_positions(std::size_t images, std::size_t positions, std::size_t blocks, bool parallel) {
  const std::size_t wanted = 4 * worker_count(images * positions * blocks, parallel);
  std::size_t each = kPositions;
  while (each > kInt8Batch && images * ((positions + each - 1) / each) * blocks < wanted) each /= 2;
  return each;
}

class Int8Conv {
 public:
  Int8Conv(const Form& form, const Conv2d& c, std::size_t images, Epilogue epilogue, float* y,
           ImageStrides strides, bool parallel)
      : w_(form.int8_slots()),
        kernel_(int8_kernels(w_.lanes, w_.window)),
        matmul_(kernels().matmul),
        positions_(c.out_height() * c.out_width()),
        blocks_((w_.rows + kRowBlock - 1) / kRowBlock),
        windows_(c, tile_positions(images, positions_, blocks_, parallel)),
        image_bytes_(c.height * c.width * c.channels),
        epilogue_(epilogue),
        y_(y),
        strides_(strides),
        parallel_(parallel) {}

  const Int8Kernels& kernel() const { return kernel_; }

  // y of `images` images of bytes, of which `first` is the first.
  void run(const std::uint8_t* bytes, const float* scales, std::size_t first, std::size_t images) const {
    const std::size_t each = windows_.tiles(), tiles = images * each;
    const std::size_t workers = worker_count(tiles * blocks_, parallel_);
    const std::size_t copy = whole_lines(windows_.tile_bytes() + kInt8Slack), own = worker_bytes();
    const auto image_of = [&](std::size_t tile) { return bytes + tile / each * image_bytes_; };
    const auto multiply = [&](std::size_t tile, std::size_t block, const std::uint8_t* from, char* memory) {
      const Int8Windows::Tile t = windows_.tile(tile % each);
      multiply_tile(t, block, windows_.rows_of(t, from), scales[tile / each],
                    y_ + (first + tile / each) * strides_.image, memory);
    };
    // As in run_tiles: threads copy tiles of their own if there are enough.
    if (windows_.in_place() || tiles >= 2 * workers) {
      const std::size_t together = copy + own, tasks = windows_.in_place() ? tiles * blocks_ : tiles;
      const Scratch<Purpose::tiles> memory(workers * together / sizeof(float));
      for_each_task(tasks, workers, [&](std::size_t worker, std::size_t task) {
        char* const mine = reinterpret_cast<char*>(memory.data()) + worker * together;
        if (windows_.in_place()) {
          multiply(task % tiles, task / tiles, image_of(task % tiles), mine);
          return;
        }
        auto* const filled = reinterpret_cast<std::uint8_t*>(mine + own);
        windows_.fill(windows_.tile(task % each), image_of(task), filled);
        for (std::size_t block = 0; block < blocks_; ++block) multiply(task, block, filled, mine);
      });
      return;
    }
    const Scratch<Purpose::tiles> memory((workers * own + tiles * copy) / sizeof(float));
    char* const data = reinterpret_cast<char*>(memory.data());
    auto* const copies = reinterpret_cast<std::uint8_t*>(data + workers * own);
    for_each_task(tiles, std::min(workers, worker_count(tiles, parallel_)),
                  [&](std::size_t, std::size_t tile) {
                    windows_.fill(windows_.tile(tile % each), image_of(tile), copies + tile * copy);
                  });
    for_each_task(tiles * blocks_, workers, [&](std::size_t worker, std::size_t task) {
      multiply(task % tiles, task / tiles, copies + task % tiles * copy, data + worker * own);
    });
  }

 private:
  std::size_t wide() const { return kMaxVectors * matmul_.lanes; }
  // For results that become planes: of a block, position by position, and transposed.
  std::size_t worker_bytes() const {
    if (strides_.pixel != 1) return 0;
    return whole_lines(sizeof(float) * kRowBlock * windows_.largest_count()) +
           sizeof(float) * (kRowBlock + 1) * wide();
  }

  void multiply_tile(const Int8Windows::Tile& tile, std::size_t block, const std::uint8_t* x, float scale,
                     float* y, char* memory) const {
    const std::size_t first_row = block * kRowBlock, rows = std::min(kRowBlock, w_.rows - first_row);
    const std::size_t begin = first_row / w_.lanes, end = (first_row + rows + w_.lanes - 1) / w_.lanes;
    const std::size_t position = windows_.first_position(tile), n = tile.count();
    const bool planes = strides_.pixel == 1;
    auto* const sums = reinterpret_cast<float*>(memory);
    // Kernels write to the places of rows in the whole of y.
    float* const to =
        planes ? reinterpret_cast<float*>(reinterpret_cast<std::uintptr_t>(sums) - first_row * sizeof(float))
               : y + position * strides_.pixel;
    const std::size_t stride = planes ? kRowBlock : strides_.pixel;
    std::array<float, kInt8Batch> scales;
    scales.fill(scale);
    const std::size_t step = n <= kInt8Batch ? end - begin : 1;
    for (std::size_t group = begin; group < end; group += step)
      windows_.for_each_pass(tile, [&](const Int8Windows::Pass& pass) {
        kernel_.multiply(w_, group, group + step, x + pass.from, windows_.stride(), scales.data(), pass.count,
                         epilogue_, {to + pass.first * stride, stride, false});
      });
    if (!planes) return;
    auto* const transposed =
        reinterpret_cast<float*>(memory + whole_lines(sizeof(float) * kRowBlock * windows_.largest_count()));
    for (std::size_t from = 0; from < n; from += wide()) {
      const std::size_t here = std::min(wide(), n - from);
      matmul_.pack({sums + from * kRowBlock, kRowBlock, false}, here, rows, kRowBlock, kMaxVectors,
                   transposed);
      for (std::size_t r = 0; r < rows; ++r)
        std::copy_n(transposed + r * wide(), here, y + (first_row + r) * positions_ + position + from);
    }
  }

  Int8View w_;
  const Int8Kernels& kernel_;
  const MatmulKernels& matmul_;
  std::size_t positions_, blocks_;
  Int8Windows windows_;
  std::size_t image_bytes_;
  Epilogue epilogue_;
  float* y_;
  ImageStrides strides_;
  bool parallel_;
};

}  // namespace

void int8_conv2d(const Form& form, const Conv2d& geometry, const float* x, ImageStrides x_strides,
                 std::size_t images, const float* bias, const std::string& activation, float* y,
                 ImageStrides y_strides) {
  const Epilogue epilogue{bias, activation_of(activation)};
  if (form.rows() == 0 || images == 0) return;
  const Conv2d c = flattened(geometry);
  const bool parallel = images * c.out_height() * c.out_width() * form.nnz() >= kSerialBelow;
  const std::size_t bytes = c.height * c.width * c.channels;
  const std::size_t step =
      std::min(images, std::max<std::size_t>(1, kRoundedBytes / std::max<std::size_t>(1, bytes)));
  const Int8Conv conv(form, c, step, epilogue, y, y_strides, parallel);
  const std::size_t room = whole_lines(step * bytes + kInt8Slack);
  const Scratch<Purpose::images> memory(room / sizeof(float) + step);
  auto* const rounded = reinterpret_cast<std::uint8_t*>(memory.data());
  float* const scales = memory.data() + room / sizeof(float);
  for (std::size_t first = 0; first < images; first += step) {
    const std::size_t here = std::min(step, images - first);
    quantise_images(conv.kernel(), c, x + first * x_strides.image, x_strides, here, rounded, scales);
    conv.run(rounded, scales, first, here);
  }
}

}  // namespace sparsam
