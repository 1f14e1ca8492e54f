// The k-th smallest magnitude in about one read of the data: a sample gives two pivots that very likely
// enclose it, one parallel pass counts against them and collects the few keys between, and the same is done
// to those. After Floyd and Rivest, "Expected time bounds for selection" (1975). A pass whose pivots missed
// still narrows the range, by half of the remaining keys at least from the fourth on, so the end is always
// reached; the answer never depends on luck.
#include "sparsam/selection.hpp"

#include <atomic>
#include <cmath>
#include <limits>
#include <new>
#include <numeric>
#include <thread>

#include "chunks.hpp"
#include "sparsam/isa.hpp"
#include "table.hpp"

namespace sparsam {
namespace {

// Elements per chunk: 256 KiB of float32, half of a small L2 cache.
constexpr std::size_t kStep = std::size_t{1} << 16;
// Up to here, bisect over the bits.
constexpr std::size_t kDirect = 512;
// Beyond this, the random reads of a larger sample cost more than its narrower bracket saves.
constexpr std::size_t kMostSampled = std::size_t{1} << 16;
// Half width of the bracket, where memory allows: it misses about once in 100 calls.
constexpr double kDeviations = 2.6;
// Scratch memory: this share of the data, or this many bytes where that is more.
constexpr double kScratchShare = 0.05;
constexpr std::size_t kScratchFloor = std::size_t{1} << 17;
constexpr std::size_t kUnknown = std::numeric_limits<std::size_t>::max();

template <class Bits>
constexpr std::size_t kRun = 64 / sizeof(Bits);  // sampled elements that lie together: a cache line

template <class Bits>
constexpr Bits key_of(Bits bits) {
  return static_cast<Bits>(bits & (static_cast<Bits>(~Bits{0}) >> 1));
}

// A source is a sequence of elements in chunks: one buffer, or arrays of any layout and mixed types.
template <class Bits>
struct Buffer {
  const Bits* data;
  std::size_t size;

  static constexpr bool gathers = false;
  std::size_t chunks() const { return (size + kStep - 1) / kStep; }
  std::size_t offset(std::size_t chunk) const { return chunk * kStep; }
  std::size_t chunk_size(std::size_t chunk) const { return std::min(kStep, size - chunk * kStep); }
  const Bits* read(std::size_t chunk, std::size_t skip, std::size_t, Bits*) const {
    return data + chunk * kStep + skip;
  }
};

template <class Bits>
class Pool {
 public:
  explicit Pool(const std::vector<View>& arrays) : arrays_(arrays), chunks_(cut(arrays, kStep)) {
    offsets_.reserve(chunks_.size());
    for (const Chunk& c : chunks_) {
      offsets_.push_back(size);
      size += c.size;
    }
    for (const View& v : arrays) gathers |= !v.contiguous() || item_size(v.dtype()) != sizeof(Bits);
  }
  std::size_t size = 0;
  bool gathers = false;
  std::size_t chunks() const { return chunks_.size(); }
  std::size_t offset(std::size_t chunk) const { return offsets_[chunk]; }
  std::size_t chunk_size(std::size_t chunk) const { return chunks_[chunk].size; }
  const Bits* read(std::size_t chunk, std::size_t skip, std::size_t n, Bits* buffer) const {
    return arrays_[chunks_[chunk].array].read(chunks_[chunk].start + skip, n, buffer);
  }

 private:
  const std::vector<View>& arrays_;
  std::vector<Chunk> chunks_;
  std::vector<std::size_t> offsets_;
};

template <class Bits>
struct Ranked {
  Bits key;
  std::size_t below, equal;
  bool nan;
};

// Spreads the sampled positions inside their strata, so that periodic data is not always met at the same
// phase.
std::uint64_t scramble(std::uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

// Fills keys with about m elements (room for m + kRun) from jittered places, one run in each of m /
// kRun<Bits> equal strata.
template <class Bits, class Source>
std::size_t sample(const Source& source, std::size_t m, std::uint64_t seed, Bits* keys) {
  const std::size_t runs = m / kRun<Bits>;
  const double stratum = static_cast<double>(source.size) / static_cast<double>(runs);
  std::size_t chunk = 0, filled = 0;
  for (std::size_t r = 0; r < runs; ++r) {
    const double jitter = static_cast<double>(scramble(seed + r + 1) >> 11) * 0x1p-53;
    const auto at =
        std::min(static_cast<std::size_t>((static_cast<double>(r) + jitter) * stratum), source.size - 1);
    while (chunk + 1 < source.chunks() && source.offset(chunk + 1) <= at) ++chunk;
    const std::size_t chunk_size = source.chunk_size(chunk), n = std::min(kRun<Bits>, chunk_size);
    const std::size_t skip = std::min((at - source.offset(chunk)) & ~(kRun<Bits> - 1), chunk_size - n);
    const Bits* p = source.read(chunk, skip, n, keys + filled);
    if (p != keys + filled) std::copy(p, p + n, keys + filled);
    filled += n;
  }
  return filled;
}

struct Pass {
  BracketCounts counts;
  std::size_t inside;
};

// Counts the whole source against the pivots; collects the keys between them, at most `room`.
template <class Bits, class Source>
Pass run_pass(const Source& source, Bits low, Bits high, bool ties, Bits* collected, std::size_t room) {
  const auto& kernel = width_kernels<Bits>(kernels());
  const std::size_t workers = worker_count(source.chunks(), source.size >= kSerialBelow);
  std::atomic<std::size_t> upto_low{0}, below_low{0}, upto_high{0}, inside{0};
  std::atomic<std::uint64_t> largest{0};
  const Buffers<Bits> buffers(workers, kBracketMost, source.gathers);
  for_each_task(source.chunks(), workers, [&](std::size_t worker, std::size_t task) {
    BracketCounts counts;
    Bits found[kBracketMost];
    for (std::size_t skip = 0; skip < source.chunk_size(task); skip += kBracketMost) {
      const std::size_t n = std::min(kBracketMost, source.chunk_size(task) - skip);
      const Bits* src = source.read(task, skip, n, buffers.of(worker));
      const std::size_t hits = kernel.bracket(src, n, low, high, ties, found, &counts);
      if (hits == 0) continue;
      const std::size_t at = inside.fetch_add(hits, std::memory_order_relaxed);
      if (at + hits <= room) std::copy(found, found + hits, collected + at);
    }
    upto_low.fetch_add(counts.upto_low, std::memory_order_relaxed);
    below_low.fetch_add(counts.below_low, std::memory_order_relaxed);
    upto_high.fetch_add(counts.upto_high, std::memory_order_relaxed);
    std::uint64_t seen = largest.load(std::memory_order_relaxed);
    while (seen < counts.largest && !largest.compare_exchange_weak(seen, counts.largest)) {
    }
  });
  return {{upto_low, below_low, upto_high, largest}, inside};
}

template <class Bits>
Ranked<Bits> select_directly(const Bits* data, std::size_t n, std::size_t k, Bits least, Bits most,
                             Bits infinity) {
  const auto& kernel = width_kernels<Bits>(kernels());
  if (kernel.count_upto(data, n, infinity) != n) return {0, 0, 0, true};
  const Bits key = kernel.bisect(data, n, k, 0, least, most);
  const std::size_t equal = kernel.count_equal(data, n, key);
  return {key, kernel.count_upto(data, n, key) - equal, equal, false};
}

template <class Bits, class Source>
Ranked<Bits> gather_and_select(const Source& source, std::size_t k, Bits least, Bits most, Bits infinity) {
  Bits data[kDirect];
  std::size_t n = 0;
  for (std::size_t c = 0; c < source.chunks(); ++c) {
    const std::size_t size = source.chunk_size(c);
    const Bits* p = source.read(c, 0, size, data + n);
    if (p != data + n) std::copy(p, p + size, data + n);
    n += size;
  }
  return select_directly(data, n, k, least, most, infinity);
}

// How `budget` elements of scratch are used for n elements. A bracket of d deviations on either side of a
// rank encloses about 1.15 d n / sqrt(sampled) keys at most (the median is the worst case; the pivots may lie
// a tenth wide of it).
struct Plan {
  std::size_t sampled, room;
  double deviations;

  Plan(std::size_t n, std::size_t budget) {
    const double size = static_cast<double>(n);
    sampled = std::min({kMostSampled, static_cast<std::size_t>(std::cbrt(size * size)), budget / 4});
    const double enclosed = 1.15 * size / std::sqrt(static_cast<double>(sampled) + 1);
    room = std::min({n, budget * 7 / 10, static_cast<std::size_t>(1.15 * kDeviations * enclosed) + 64});
    deviations = std::min(kDeviations, static_cast<double>(room) / (1.15 * enclosed));
  }
};

// The k-th smallest key, known to lie in [least, most]. NaNs, the keys above infinity, are only reported.
// Uses at most `budget` elements of memory.
template <class Bits, class Source>
Ranked<Bits> select(const Source& source, std::size_t k, Bits least, Bits most, Bits infinity,
                    std::size_t budget) {
  const std::size_t n = source.size;
  if (n <= kDirect) return gather_and_select(source, k, least, most, infinity);
  const auto& kernel = width_kernels<Bits>(kernels());
  const Plan plan(n, budget);
  const std::unique_ptr<Bits[]> collected(new Bits[plan.room]);
  std::unique_ptr<Bits[]> keys(new Bits[plan.sampled + kRun<Bits>]);

  // `before` keys are below least, `upto` are at most `most`.
  std::size_t before = 0, upto = n;
  double width = plan.deviations;
  for (std::size_t attempt = 0;; ++attempt) {
    Bits low = static_cast<Bits>(least + (most - least) / 2), high = low;
    bool ties = true;
    if (attempt < 4) {
      std::size_t count = sample(source, plan.sampled, attempt << 40, keys.get());
      const auto outside = [&](Bits bits) { return key_of(bits) < least || key_of(bits) > most; };
      if (attempt > 0)
        count =
            static_cast<std::size_t>(std::remove_if(keys.get(), keys.get() + count, outside) - keys.get());
      if (count > 0) {
        const double p = static_cast<double>(k - before) / static_cast<double>(upto - before),
                     c = static_cast<double>(count);
        const double margin = width * (std::sqrt(c * p * (1 - p)) + 1);
        const double first = std::floor(p * c - margin), last = std::ceil(p * c + margin);
        const bool exact = attempt > 0 || sizeof(Bits) == 2;
        const auto tolerance = exact ? 0 : static_cast<std::size_t>(margin / 5);
        low = first < 1
                  ? least
                  : kernel.bisect(keys.get(), count, static_cast<std::size_t>(first), tolerance, least, most);
        high = last >= c ? most
                         : kernel.bisect(keys.get(), count, static_cast<std::size_t>(last) + tolerance,
                                         tolerance, least, most);
        // Ties at a pivot show in the sample as a repeated key; without them two comparisons fewer are
        // enough.
        const auto repeated = [&](Bits pivot) { return kernel.count_equal(keys.get(), count, pivot) > 1; };
        ties = attempt > 0 || low == high || repeated(low) || repeated(high);
      }
    }
    const Pass pass = run_pass(source, low, high, ties, collected.get(), plan.room);
    if (pass.counts.largest > infinity) return {0, 0, 0, true};
    const std::size_t upto_low = pass.counts.upto_low, below_high = upto_low + pass.inside;
    const std::size_t below_low = pass.counts.below_low, upto_high = pass.counts.upto_high;
    if (k > upto_low && k <= below_high && pass.inside <= plan.room) {
      keys.reset();
      const std::size_t left = budget - plan.room;
      const auto above = static_cast<Bits>(low + 1), below = static_cast<Bits>(high - 1);
      // Where too little memory is left to narrow things down, bisection needs none.
      Ranked<Bits> r =
          Plan(pass.inside, left).deviations < 1
              ? select_directly(collected.get(), pass.inside, k - upto_low, above, below, infinity)
              : select(Buffer<Bits>{collected.get(), pass.inside}, k - upto_low, above, below, infinity,
                       left);
      r.below += upto_low;
      return r;
    }
    if (ties && k > below_low && k <= upto_low) return {low, below_low, upto_low - below_low, false};
    if (ties && low < high && k > below_high && k <= upto_high)
      return {high, below_high, upto_high - below_high, false};
    // The pivots missed, or met a tie unprepared, or too much lay between: go on in the part that holds the
    // answer.
    if (k <= upto_low) {
      most = ties ? static_cast<Bits>(low - 1) : low;
      upto = ties ? below_low : upto_low;
    } else if (k <= below_high) {
      least = static_cast<Bits>(low + 1);
      most = static_cast<Bits>(high - 1);
      before = upto_low;
      upto = below_high;
      continue;  // the sample was right, so the next bracket need not be wider
    } else {
      least = ties ? static_cast<Bits>(high + 1) : high;
      before = ties ? upto_high : below_high;
    }
    width *= 4;
  }
}

// The type in which keys of all arrays can be compared: their own, or the wider one where they differ.
DType common_dtype(const std::vector<View>& arrays) {
  DType common = arrays.front().dtype();
  for (const View& v : arrays) {
    if (v.dtype() == common) continue;
    common = item_size(v.dtype()) == 8 || item_size(common) == 8 ? DType::f64 : DType::f32;
  }
  return common;
}

}  // namespace

Threshold threshold(const std::vector<View>& arrays, std::size_t k) {
  const DType common = common_dtype(arrays);
  std::size_t bytes = 0;
  for (const View& v : arrays) bytes += v.size() * item_size(v.dtype());
  const std::size_t scratch =
      std::max(kScratchFloor, static_cast<std::size_t>(kScratchShare * static_cast<double>(bytes)));
  return with_bits(item_size(common), [&](auto width) -> Threshold {
    using Bits = decltype(width);
    const std::size_t budget = scratch / sizeof(Bits);
    const auto infinity = static_cast<Bits>(infinity_key(common));
    std::vector<View> by_memory;
    for (const View& v : arrays) by_memory.push_back(v.in_memory_order());
    const View& only = by_memory.front();
    const Ranked<Bits> r =
        by_memory.size() == 1 && only.contiguous()
            ? select(Buffer<Bits>{only.direct<Bits>(0), only.size()}, k, Bits{0}, infinity, infinity, budget)
            : select(Pool<Bits>(by_memory), k, Bits{0}, infinity, infinity, budget);
    if (r.nan) return {std::numeric_limits<double>::quiet_NaN(), 0, 0};
    return {key_to_double(r.key, common), r.below, r.equal};
  });
}

namespace {

template <class Bits>
void mark_chunk(const View& array, const Chunk& c, double value, const std::atomic<std::size_t>* ties_before,
                std::atomic<std::size_t>* ties_upto, std::size_t ties_kept, std::uint64_t* words,
                const View* out, void* scratch) {
  const auto& kernel = width_kernels<Bits>(kernels());
  Bits* buffer = static_cast<Bits*>(scratch);
  const Bits* src = array.read(c.start, c.size, buffer);
  const Bits t = static_cast<Bits>(key_at_most(value, array.dtype()));
  std::size_t ties_here = 0;
  if (ties_upto != nullptr) {
    // Chunks are taken in order, so the chunk before this one is done or being done by a running thread.
    const bool exact = key_to_double(t, array.dtype()) == value;
    const std::size_t found = exact ? kernel.count_equal(src, c.size, t) : 0;
    std::size_t before = 0;
    if (ties_before != nullptr)
      while ((before = ties_before->load(std::memory_order_acquire)) == kUnknown) std::this_thread::yield();
    ties_upto->store(before + found, std::memory_order_release);
    ties_here = before >= ties_kept ? 0 : std::min(found, ties_kept - before);
  }
  Bits* direct = out == nullptr ? nullptr : out->direct<Bits>(c.start);
  Bits* to = out == nullptr ? nullptr : direct != nullptr ? direct : buffer;
  kernel.mark(src, c.size, t, ties_here, words + c.start / 64, to);
  if (out != nullptr && direct == nullptr) out->write(c.start, c.size, buffer);
}

}  // namespace

void mark(const std::vector<View>& arrays, double value, std::size_t ties_kept,
          const std::vector<std::uint64_t*>& words, const std::vector<View>& outs) {
  const std::vector<Chunk> chunks = cut(arrays, kStep);
  std::size_t size = 0;
  bool gathers = false;
  for (const View& v : arrays) {
    size += v.size();
    gathers |= !v.contiguous();
  }
  for (const View& v : outs) gathers |= !v.contiguous();
  const std::size_t workers = worker_count(chunks.size(), size >= kSerialBelow);
  const Buffers<std::uint64_t> buffers(workers, kStep, gathers);
  std::unique_ptr<std::atomic<std::size_t>[]> ties;
  if (ties_kept > 0) {
    ties.reset(new std::atomic<std::size_t>[chunks.size()]);
    for (std::size_t i = 0; i < chunks.size(); ++i) ties[i].store(kUnknown, std::memory_order_relaxed);
  }
  for_each_task(chunks.size(), workers, [&](std::size_t worker, std::size_t task) {
    const Chunk& c = chunks[task];
    const View* out = outs.empty() ? nullptr : &outs[c.array];
    with_bits(item_size(arrays[c.array].dtype()), [&](auto width) {
      using Bits = decltype(width);
      std::atomic<std::size_t>* upto = ties == nullptr ? nullptr : &ties[task];
      mark_chunk<Bits>(arrays[c.array], c, value, upto == nullptr || task == 0 ? nullptr : upto - 1, upto,
                       ties_kept, words[c.array], out, buffers.of(worker));
    });
  });
}

bool keep_of_group(const View& array, std::size_t keep, std::size_t m, std::uint64_t* words) {
  const std::size_t step = 64 * m * std::max<std::size_t>(1, kStep / (64 * m));
  const std::vector<Chunk> chunks = cut({array}, step);
  const std::size_t workers = worker_count(chunks.size(), array.size() >= kSerialBelow);
  return with_bits(item_size(array.dtype()), [&](auto width) {
    using Bits = decltype(width);
    const auto& kernel = width_kernels<Bits>(kernels());
    const auto infinity = static_cast<Bits>(infinity_key(array.dtype()));
    std::atomic<bool> numbers{true};
    const Buffers<Bits> buffers(workers, step, !array.contiguous());
    for_each_task(chunks.size(), workers, [&](std::size_t worker, std::size_t task) {
      const Chunk& c = chunks[task];
      const Bits* src = array.read(c.start, c.size, buffers.of(worker));
      if (kernel.keep_of_group(src, c.size, keep, m, words + c.start / 64) > infinity) numbers.store(false);
    });
    return numbers.load();
  });
}

namespace {

// Up to here bisection over the bits of a row, which lies in an L1 cache, is faster than a sample and a pass.
// Measured crossings, AVX2 and AVX-512: beyond 8192 for 16 bits; 2500 and 8192 for 32; 1024 and 2500 for 64.
template <class Bits>
constexpr std::size_t kDirectRow = sizeof(Bits) == 2   ? 8192
                                   : sizeof(Bits) == 4 ? 3072
                                                       : 1024;

// Stores n bits at bit `start` of words that are 0 from there on; bits past n in `bits` are 0.
void store_bits(const std::uint64_t* bits, std::size_t n, std::uint64_t* words, std::size_t start) {
  const std::size_t shift = start % 64;
  std::uint64_t* to = words + start / 64;
  for (std::size_t i = 0; i < (n + 63) / 64; ++i) {
    to[i] |= bits[i] << shift;
    if (shift + std::min<std::size_t>(64, n - 64 * i) > 64) to[i + 1] |= bits[i] >> (64 - shift);
  }
}

}  // namespace

bool keep_of_row(const View& array, std::size_t cols, std::size_t k, std::uint64_t* words) {
  // Tasks of whole rows that share no mask word, as large as chunks are elsewhere.
  const std::size_t unit = cols * (64 / std::gcd(cols, std::size_t{64}));
  const std::vector<Chunk> chunks = cut({array}, unit * std::max<std::size_t>(1, kStep / unit));
  const std::size_t workers = worker_count(chunks.size(), array.size() >= kSerialBelow);
  const std::size_t row_words = (cols + 63) / 64;
  return with_bits(item_size(array.dtype()), [&](auto width) {
    using Bits = decltype(width);
    const auto& kernel = width_kernels<Bits>(kernels());
    const auto infinity = static_cast<Bits>(infinity_key(array.dtype()));
    const std::size_t budget = std::max(kScratchFloor / sizeof(Bits), cols);
    const Buffers<Bits> buffers(workers, cols, !array.contiguous());
    const Buffers<std::uint64_t> rows(workers, row_words, true);
    std::atomic<bool> numbers{true}, memory{true};
    for_each_task(chunks.size(), workers, [&](std::size_t worker, std::size_t task) {
      const Chunk& c = chunks[task];
      std::uint64_t* to = words + c.start / 64;
      std::fill(to, to + (c.size + 63) / 64, 0);
      for (std::size_t start = 0; start < c.size && numbers.load(std::memory_order_relaxed); start += cols) {
        const Bits* src = array.read(c.start + start, cols, buffers.of(worker));
        Ranked<Bits> r{};
        try {
          r = cols <= kDirectRow<Bits>
                  ? select_directly(src, cols, k, Bits{0}, infinity, infinity)
                  : select(Buffer<Bits>{src, cols}, k, Bits{0}, infinity, infinity, budget);
        } catch (const std::bad_alloc&) {
          memory.store(false);
          return;
        }
        if (r.nan) numbers.store(false);
        kernel.mark(src, cols, r.key, r.equal - (k - r.below), rows.of(worker), nullptr);
        store_bits(rows.of(worker), cols, to, start);
      }
    });
    if (!memory.load()) throw std::bad_alloc();
    return numbers.load();
  });
}

Position find_nan(const std::vector<View>& arrays) {
  for (std::size_t a = 0; a < arrays.size(); ++a) {
    const View& v = arrays[a];
    const std::vector<Chunk> chunks = cut({v}, kStep);
    const std::size_t workers = worker_count(chunks.size(), v.size() >= kSerialBelow);
    std::atomic<std::size_t> first{kUnknown};
    with_bits(item_size(v.dtype()), [&](auto width) {
      using Bits = decltype(width);
      const auto infinity = static_cast<Bits>(infinity_key(v.dtype()));
      const Buffers<Bits> buffers(workers, kStep, !v.contiguous());
      for_each_task(chunks.size(), workers, [&](std::size_t worker, std::size_t task) {
        const Chunk& c = chunks[task];
        const Bits* src = v.read(c.start, c.size, buffers.of(worker));
        if (width_kernels<Bits>(kernels()).count_upto(src, c.size, infinity) == c.size) return;
        std::size_t i = 0;
        while (key_of(src[i]) <= infinity) ++i;
        std::size_t seen = first.load();
        while (c.start + i < seen && !first.compare_exchange_weak(seen, c.start + i)) {
        }
      });
    });
    if (first.load() != kUnknown) return {a, first.load(), true};
  }
  return {0, 0, false};
}

}  // namespace sparsam
