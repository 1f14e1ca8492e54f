// Quads for AVX2: what they need of 256-bit registers.
#pragma once
#include "int8.hpp"
#include "int8_256.hpp"

namespace sparsam::SPARSAM_TARGET {
namespace {

// For each set of eight slots, the shuffles that bring those that are used to the front, of uint16 and bytes.
struct TakeTable {
  alignas(16) std::uint8_t wide[256][16];
  std::uint8_t narrow[256][8];
  constexpr TakeTable() : wide(), narrow() {
    for (unsigned used = 0; used < 256; ++used) {
      std::uint8_t n = 0;
      for (std::uint8_t slot = 0; slot < 8; ++slot)
        if ((used >> slot & 1) != 0) {
          narrow[used][n] = slot;
          wide[used][2 * n] = static_cast<std::uint8_t>(2 * slot);
          wide[used][2 * n + 1] = static_cast<std::uint8_t>(2 * slot + 1);
          ++n;
        }
      for (; n < 8; ++n) narrow[used][n] = wide[used][2 * n] = wide[used][2 * n + 1] = 128;  // 0
    }
  }
};
constexpr TakeTable kTake;

struct Quads {
  static constexpr std::size_t kTile = 32;
  using Reg = __m256i;

  static Reg load(const void* p) { return Bytes256::load(p); }
  static void store(void* p, Reg r) { _mm256_storeu_si256(static_cast<__m256i*>(p), r); }
  static Reg set(std::int32_t sum) { return _mm256_set1_epi32(sum); }

  // Which row of x stands where in a tile: so that sums of quads leave in order.
  static std::size_t row(std::size_t place) { return 8 * (place % 16 / 4) + 4 * (place / 16) + place % 4; }
  // Columns [0, 16) of a tile from those of its rows.
  static void turn(const std::uint8_t* const (&x)[kTile], std::size_t column, std::size_t n,
                   std::uint8_t* to) {
    Reg a[16], b[16];
    for (std::size_t i = 0; i < 16; ++i) {
      const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x[i] + column));
      const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x[i + 16] + column));
      a[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
    }
    for (int round = 0; round < 4; ++round) {
      for (std::size_t i = 0; i < 8; ++i) {
        b[2 * i] = _mm256_unpacklo_epi8(a[i], a[i + 8]);
        b[2 * i + 1] = _mm256_unpackhi_epi8(a[i], a[i + 8]);
      }
      for (std::size_t i = 0; i < 16; ++i) a[i] = b[i];
    }
    for (std::size_t i = 0; i < n; ++i) store(to + i * kTile, a[i]);
  }

  // The weights of a pair that are used, behind those of each lane: columns times kQuadStep, and values.
  // Eight of each are written.
  static void take(const std::uint8_t* code, const std::uint16_t* start, std::uint16_t* columns,
                   std::uint8_t* values, std::uint32_t (&next)[8]) {
    const Bytes256::Pair pair(code);
    const __m128i starts = _mm_unpacklo_epi64(_mm_set1_epi16(static_cast<short>(start[0])),
                                              _mm_set1_epi16(static_cast<short>(start[1])));
    const __m256i both_starts = _mm256_broadcastsi128_si256(starts);
    take_lanes<0, 4>(_mm256_unpacklo_epi32(pair.value0, pair.value1),
                     _mm256_unpacklo_epi32(pair.offset0, pair.offset1), both_starts, columns, values, next);
    take_lanes<2, 6>(_mm256_unpackhi_epi32(pair.value0, pair.value1),
                     _mm256_unpackhi_epi32(pair.offset0, pair.offset1), both_starts, columns, values, next);
  }

  // Adds quads of one row of W, whose columns and values these are, to its sums with the rows of a tile. As
  // in slots, neighbouring products fit int16.
  static void add(const std::uint16_t* column, const std::uint8_t* value, std::size_t quads,
                  const std::uint8_t* tile, std::int32_t first, std::int32_t* sums) {
    constexpr std::size_t kBytes = kTile / kQuadStep;
    const Reg ones = _mm256_set1_epi16(1);
    Reg sum0 = set(first), sum1 = sum0, sum2 = sum0, sum3 = sum0;
    for (std::size_t i = 0; i < quads; ++i, column += 4, value += 4) {
      std::int32_t four;
      __builtin_memcpy(&four, value, sizeof four);
      const Reg w = set(four);
      const Reg a = load(tile + kBytes * column[0]), b = load(tile + kBytes * column[1]);
      const Reg c = load(tile + kBytes * column[2]), d = load(tile + kBytes * column[3]);
      const Reg ab0 = _mm256_unpacklo_epi8(a, b), ab1 = _mm256_unpackhi_epi8(a, b);
      const Reg cd0 = _mm256_unpacklo_epi8(c, d), cd1 = _mm256_unpackhi_epi8(c, d);
      const Reg twos0 = _mm256_maddubs_epi16(_mm256_unpacklo_epi16(ab0, cd0), w);
      const Reg twos1 = _mm256_maddubs_epi16(_mm256_unpackhi_epi16(ab0, cd0), w);
      const Reg twos2 = _mm256_maddubs_epi16(_mm256_unpacklo_epi16(ab1, cd1), w);
      const Reg twos3 = _mm256_maddubs_epi16(_mm256_unpackhi_epi16(ab1, cd1), w);
      sum0 = _mm256_add_epi32(sum0, _mm256_madd_epi16(twos0, ones));
      sum1 = _mm256_add_epi32(sum1, _mm256_madd_epi16(twos1, ones));
      sum2 = _mm256_add_epi32(sum2, _mm256_madd_epi16(twos2, ones));
      sum3 = _mm256_add_epi32(sum3, _mm256_madd_epi16(twos3, ones));
    }
    store(sums, sum0);
    store(sums + 8, sum1);
    store(sums + 16, sum2);
    store(sums + 24, sum3);
  }

  static Floats::Reg to_floats(const std::int32_t* sums) { return _mm256_cvtepi32_ps(load(sums)); }

 private:
  // Of lanes kLow, kLow + 1, kHigh and kHigh + 1, each with the slots of both steps side by side.
  template <std::size_t kLow, std::size_t kHigh>
  static void take_lanes(__m256i value, __m256i offset, __m256i starts, std::uint16_t* columns,
                         std::uint8_t* values, std::uint32_t (&next)[8]) {
    const __m256i none = _mm256_cmpeq_epi8(value, _mm256_setzero_si256());
    const std::uint32_t used = ~static_cast<std::uint32_t>(_mm256_movemask_epi8(none));
    const __m128i value_low = _mm256_castsi256_si128(value), value_high = _mm256_extracti128_si256(value, 1);
    const __m256i low = places(_mm256_castsi256_si128(offset), starts);
    const __m256i high = places(_mm256_extracti128_si256(offset, 1), starts);
    take_lane(_mm256_castsi256_si128(low), value_low, used & 255, columns, values, next[kLow]);
    take_lane(_mm256_extracti128_si256(low, 1), _mm_unpackhi_epi64(value_low, value_low), used >> 8 & 255,
              columns, values, next[kLow + 1]);
    take_lane(_mm256_castsi256_si128(high), value_high, used >> 16 & 255, columns, values, next[kHigh]);
    take_lane(_mm256_extracti128_si256(high, 1), _mm_unpackhi_epi64(value_high, value_high), used >> 24,
              columns, values, next[kHigh + 1]);
  }
  static __m256i places(__m128i offsets, __m256i starts) {
    static_assert(kQuadStep == 4);
    return _mm256_slli_epi16(_mm256_add_epi16(_mm256_cvtepu8_epi16(offsets), starts), 2);
  }
  static void take_lane(__m128i columns, __m128i values, std::uint32_t used, std::uint16_t* to_columns,
                        std::uint8_t* to_values, std::uint32_t& next) {
    const __m128i wide = _mm_load_si128(reinterpret_cast<const __m128i*>(kTake.wide[used]));
    const __m128i narrow = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kTake.narrow[used]));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to_columns + next), _mm_shuffle_epi8(columns, wide));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to_values + next), _mm_shuffle_epi8(values, narrow));
    next += static_cast<std::uint32_t>(__builtin_popcount(used));
  }
};

}  // namespace
}  // namespace sparsam::SPARSAM_TARGET
