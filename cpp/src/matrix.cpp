#include "sparsam/matrix.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "chunks.hpp"
#include "panels.hpp"
#include "sparsam/isa.hpp"
#include "sparsam/masks.hpp"
#include "table.hpp"

namespace sparsam {
namespace {

// Rows in stretches, shared out over threads.
struct RowTasks {
  std::size_t rows, step, tasks, workers;

  RowTasks(std::size_t n_rows, std::size_t cols)
      : rows(n_rows),
        step(std::max<std::size_t>(1, (std::size_t{1} << 16) / std::max<std::size_t>(cols, 1))),
        tasks((rows + step - 1) / step),
        workers(worker_count(tasks, rows * cols >= kSerialBelow)) {}

  template <class Body>
  void run(Body&& body) const {  // body(worker, row)
    for_each_task(tasks, workers, [&](std::size_t worker, std::size_t task) {
      for (std::size_t r = task * step; r < std::min(rows, (task + 1) * step); ++r) body(worker, r);
    });
  }
};

}  // namespace

PackedMatrix::PackedMatrix(const View& w, std::size_t rows, std::size_t cols)
    : rows_(rows),
      cols_(cols),
      row_words_(words_for(cols)),
      dtype_(w.dtype()),
      words_(8 * rows * row_words_) {
  with_bits(item_size(dtype_), [&](auto width) {
    using Bits = decltype(width);
    const auto& kernel = width_kernels<Bits>(kernels());
    const RowTasks all(rows, cols);
    const Buffers<Bits> buffers(all.workers, cols, !w.contiguous());
    all.run([&](std::size_t worker, std::size_t r) {
      const Bits* src = w.read(r * cols, cols, buffers.of(worker));
      kernel.threshold_mask(src, cols, 0, 0, words_.as<std::uint64_t>() + r * row_words_,
                            static_cast<Bits*>(nullptr));
    });
    index_rows();
    values_ = Memory::readable_past(nnz() * item_size(dtype_));
    all.run([&](std::size_t worker, std::size_t r) {
      const Bits* src = w.read(r * cols, cols, buffers.of(worker));
      Bits* to = values_.as<Bits>() + row_start_[r];
      for (std::size_t k = 0; k < row_words_; ++k)
        for (std::uint64_t bits = words_.as<std::uint64_t>()[r * row_words_ + k]; bits != 0; bits &= bits - 1)
          *to++ = src[k * 64 + static_cast<std::size_t>(__builtin_ctzll(bits))];
    });
  });
}

PackedMatrix::PackedMatrix(std::size_t rows, std::size_t cols, const std::uint8_t* bits, const View& values)
    : rows_(rows),
      cols_(cols),
      row_words_(words_for(cols)),
      dtype_(values.dtype()),
      words_(8 * rows * row_words_) {
  const std::size_t row_bytes = (cols + 7) / 8;
  for (std::size_t r = 0; r < rows && row_bytes > 0; ++r) {
    words_.as<std::uint64_t>()[(r + 1) * row_words_ - 1] = 0;
    std::memcpy(words_.as<std::uint64_t>() + r * row_words_, bits + r * row_bytes, row_bytes);
    if (cols % 64 != 0 && words_.as<std::uint64_t>()[(r + 1) * row_words_ - 1] >> cols % 64 != 0)
      throw std::invalid_argument("row " + std::to_string(r) + ": bits past the last column are set");
  }
  index_rows();
  if (nnz() != values.size())
    throw std::invalid_argument(std::to_string(values.size()) + " values for " + std::to_string(nnz()) +
                                " bits that are set");
  values_ = Memory::readable_past(nnz() * item_size(dtype_));
  with_bits(item_size(dtype_), [&](auto width) {
    using Bits = decltype(width);
    Bits* own = values_.as<Bits>();
    const Bits* from = values.read(0, values.size(), own);
    if (from != own && nnz() > 0) std::memcpy(own, from, nnz() * sizeof(Bits));
  });
}

PackedMatrix::~PackedMatrix() = default;

BitmaskView PackedMatrix::view() const {
  return {rows_, cols_, row_words_, words_.as<std::uint64_t>(), row_start_.data(), values_.as<char>()};
}

void PackedMatrix::index_rows() {
  row_start_.assign(rows_ + 1, 0);
  shared_rows_ = rows_ > 0 && rows_ % 4 == 0 ? 4 : 0;
  for (std::size_t r = 0; r < rows_; ++r) {
    const std::uint64_t* words = words_.as<std::uint64_t>() + r * row_words_;
    std::uint64_t n = 0;
    for (std::size_t k = 0; k < row_words_; ++k)
      n += static_cast<std::uint64_t>(__builtin_popcountll(words[k]));
    row_start_[r + 1] = row_start_[r] + n;
    if (shared_rows_ != 0 && r % 4 != 0 && !std::equal(words, words + row_words_, words - row_words_))
      shared_rows_ = 0;
  }
}

double PackedMatrix::density() const {
  if (rows_ == 0 || cols_ == 0) return 0.0;
  return static_cast<double>(nnz()) / (static_cast<double>(rows_) * static_cast<double>(cols_));
}

std::size_t PackedMatrix::bytes() const { return words_.bytes() + 8 * row_start_.size() + values_.bytes(); }

std::size_t PackedMatrix::panel_bytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::size_t n = 0;
  for (const auto& p : panels_) n += p->bytes();
  return n;
}

void PackedMatrix::bits(std::uint8_t* to) const {
  const std::size_t row_bytes = (cols_ + 7) / 8;
  for (std::size_t r = 0; r < rows_ && row_bytes > 0; ++r)
    std::memcpy(to + r * row_bytes, words_.as<std::uint64_t>() + r * row_words_, row_bytes);
}

void PackedMatrix::unpack(void* to) const {
  with_bits(item_size(dtype_), [&](auto width) {
    using Bits = decltype(width);
    RowTasks(rows_, cols_).run([&](std::size_t, std::size_t r) {
      Bits* row = static_cast<Bits*>(to) + r * cols_;
      const Bits* from = values_.as<Bits>() + row_start_[r];
      std::fill(row, row + cols_, Bits{0});
      for (std::size_t k = 0; k < row_words_; ++k)
        for (std::uint64_t bits = words_.as<std::uint64_t>()[r * row_words_ + k]; bits != 0; bits &= bits - 1)
          row[k * 64 + static_cast<std::size_t>(__builtin_ctzll(bits))] = *from++;
    });
  });
}

const Panels& PackedMatrix::panels(std::size_t depth) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& p : panels_)
    if (p->depth == depth) return *p;
  panels_.push_back(
      std::make_unique<Panels>(build_panels(view(), item_size(dtype_), depth, shared_rows_ == 4)));
  return *panels_.back();
}

}  // namespace sparsam
