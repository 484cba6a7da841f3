// Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
//
// Many tokens: Y = A X, tokens along the vector registers.
//
// Each weight that exists is unpacked once for all tokens, and then multiplied with a row of X, whose `width` tokens lie
// side by side. The part of X that a block of columns needs stays in a level-1 cache while many rows of A use it.
//
// Where the processor multiplies bfloat16, two existing weights of a row are multiplied with two rows of X at once.

#pragma once

#include "vector.h"

namespace {

constexpr int64_t kRowBlock = 128;

// X as tiles of `width` tokens are packed: [tiles, columns, width] of what the products multiply.
#if NT_BF16
template <typename V, typename X>
using Packed = std::conditional_t<std::is_same_v<V, BFloat16> || std::is_same_v<V, int8_t>, X, float>;
#else
template <typename V, typename X> using Packed = float;
#endif

// Columns at a time, so that their part of 64 tokens takes 32 KB.
template <typename P> constexpr int64_t kColumnBlock = 512 / sizeof(P);

// Where a token of a tile lies in a row of packed X.
template <typename P> int64_t place(int64_t token) {
  if (std::is_same_v<P, float>) return token;
  // The processor interleaves two rows by eighths of a register, the lower halves of them apart from the upper ones.
  return (token & ~31) | (token >> 2 & 3) << 3 | (token >> 4 & 1) << 2 | (token & 3);
}

// The existing weights of one block of rows and columns, row by row.
template <typename P> class Unpacked {
 public:
  Unpacked() : values_(size), columns_(size) {}

  void clear() { begins_[0] = count_ = 0; }
  void end_row(int64_t row) {
    if (count_ % 2) values_[count_] = {}, columns_[count_++] = 0;  // weights are taken in pairs
    begins_[row + 1] = count_;
  }
  int64_t begin(int64_t row) const { return begins_[row]; }
  int64_t end(int64_t row) const { return begins_[row + 1]; }
  const P* values() const { return values_.data(); }
  const uint16_t* columns() const { return columns_.data(); }

  // Adds the weights of one word of the bitmap, whose first column is `first`.
  template <typename V> void add(uint32_t bits, const V* from, int64_t first) {
    P* values = values_.data() + count_;
    uint16_t* columns = columns_.data() + count_;
    const int added = __builtin_popcount(bits);
#if NT_AVX512
    alignas(64) static const uint16_t kCount[32] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                                    16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
    const __m512i places = _mm512_add_epi16(_mm512_load_si512(kCount), _mm512_set1_epi16(static_cast<short>(first)));
    _mm512_storeu_si512(columns, _mm512_maskz_compress_epi16(bits, places));
    convert(from, values);
    if (added > 16) convert(from + 16, values + 16);
#else
    for (; bits; bits &= bits - 1) {
      *columns++ = static_cast<uint16_t>(first + __builtin_ctz(bits));
      *values++ = to_float(*from++);
    }
#endif
    count_ += added;
  }

 private:
  static constexpr int64_t size = kRowBlock * (kColumnBlock<P> + 1) + kBits;
  std::vector<P> values_;
  std::vector<uint16_t> columns_;
  int64_t begins_[kRowBlock + 1];
  int64_t count_ = 0;

#if NT_AVX512
  // Sixteen values.
  static __m256i load16(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
  static __m512 widen(const BFloat16* from) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load16(from)), 16));
  }
  static __m512 widen(const Float16* from) { return _mm512_cvtph_ps(load16(from)); }
  static __m512 widen(const int8_t* from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
  }
  static __m512 widen(const float* from) { return _mm512_loadu_ps(from); }
  template <typename V> static void convert(const V* from, float* to) { _mm512_storeu_ps(to, widen(from)); }
  static void convert(const BFloat16* from, BFloat16* to) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), load16(from));
  }
  // Without rounding: an int8 has no more digits than a bfloat16.
  template <typename V> static void convert(const V* from, BFloat16* to) {
    const __m512i upper = _mm512_srli_epi32(_mm512_castps_si512(widen(from)), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(upper));
  }
#endif
};

// Adds the weights of one row times their rows of `x` [columns, Width] to `y` [Width]. Inlined, and its loops unrolled:
// GCC would keep the sums in memory.
template <int Width>
inline __attribute__((always_inline)) void accumulate(const float* values, const uint16_t* columns, int64_t count,
                                                      const float* x, float* y) {
  constexpr int registers = Width / kLanes;
  Lanes sums[registers];
#pragma GCC unroll 16
  for (int r = 0; r < registers; ++r) sums[r] = load_lanes(y + r * kLanes);
  for (int64_t i = 0; i < count; ++i) {
    const float* row = x + columns[i] * Width;
    const float value = values[i];
#pragma GCC unroll 16
    for (int r = 0; r < registers; ++r) sums[r] += value * load_lanes(row + r * kLanes);
  }
#pragma GCC unroll 16
  for (int r = 0; r < registers; ++r) store_lanes(sums[r], y + r * kLanes);
}

#if NT_BF16
template <int Width>
inline __attribute__((always_inline)) void accumulate(const BFloat16* values, const uint16_t* columns, int64_t count,
                                                      const BFloat16* x, float* y) {
  constexpr int registers = Width / kLanes;
  __m512 sums[registers];
#pragma GCC unroll 4
  for (int r = 0; r < registers; ++r) sums[r] = _mm512_load_ps(y + r * kLanes);
  for (int64_t i = 0; i < count; i += 2) {
    const BFloat16 *first = x + columns[i] * Width, *second = x + columns[i + 1] * Width;
    int32_t both;
    std::memcpy(&both, values + i, sizeof both);
    const __m512bh pair = reinterpret_cast<__m512bh>(_mm512_set1_epi32(both));
#pragma GCC unroll 4
    for (int r = 0; r < registers; r += 2) {
      const __m512i one = _mm512_load_si512(first + r * kLanes), other = _mm512_load_si512(second + r * kLanes);
      const __m512i lower = _mm512_unpacklo_epi16(one, other), upper = _mm512_unpackhi_epi16(one, other);
      sums[r] = _mm512_dpbf16_ps(sums[r], pair, reinterpret_cast<__m512bh>(lower));
      sums[r + 1] = _mm512_dpbf16_ps(sums[r + 1], pair, reinterpret_cast<__m512bh>(upper));
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < registers; ++r) _mm512_store_ps(y + r * kLanes, sums[r]);
}
#endif

// A block of rows for all tiles: y [tiles, kRowBlock, Width] = A[rows] x [tiles, columns, Width].
template <typename V, int Width, typename P>
void multiply_rows(const NtMatrix& a, int64_t first, int64_t last, const P* x, int64_t tiles, Unpacked<P>& unpacked,
                   float* y) {
  constexpr int64_t step = kColumnBlock<P> / kBits;
  const int64_t words = words_per_row(a.columns);
  const V* next[kRowBlock];
  for (int64_t row = first; row < last; ++row) next[row - first] = static_cast<const V*>(a.values) + a.starts[row];
  std::memset(y, 0, sizeof(float) * tiles * kRowBlock * Width);
  for (int64_t begin = 0; begin < words; begin += step) {
    const int64_t end = std::min(words, begin + step);
    unpacked.clear();
    for (int64_t row = first; row < last; ++row) {
      const V*& values = next[row - first];
      __builtin_prefetch(reinterpret_cast<const char*>(values) + 256);
      for (int64_t word = begin; word < end; ++word) {
        const int64_t left = a.columns - word * kBits;
        const uint32_t all = left >= kBits ? ~0u : (1u << left) - 1;
        const uint32_t bits = a.bitmap ? a.bitmap[row * words + word] : all;
        unpacked.add(bits, values, (word - begin) * kBits);
        values += __builtin_popcount(bits);
      }
      unpacked.end_row(row - first);
    }
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const P* x_block = x + (tile * words + begin) * kBits * Width;
      float* y_block = y + tile * kRowBlock * Width;
      for (int64_t row = 0; row < last - first; ++row) {
        const int64_t from = unpacked.begin(row);
        accumulate<Width>(unpacked.values() + from, unpacked.columns() + from, unpacked.end(row) - from, x_block,
                          y_block + row * Width);
      }
    }
  }
}

// Y [tokens, rows] = X [tokens, columns] A^T.
template <typename V, int Width, typename X>
void multiply_tiles(const NtMatrix& a, const X* x, X* y, int64_t tokens) {
  using P = Packed<V, X>;
  const int64_t words = words_per_row(a.columns), tiles = (tokens + Width - 1) / Width;
  Buffer buffer(tiles * words * kBits * Width * sizeof(P) / sizeof(float));
  P* const packed = reinterpret_cast<P*>(buffer.data());
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (int64_t part = 0; part < tiles * words; ++part) {
      const int64_t tile = part / words, first = part % words * kBits;
      const int64_t last_token = std::min(tokens, (tile + 1) * Width);
      P* out = packed + part * kBits * Width;
      std::memset(out, 0, sizeof(P) * kBits * Width);
      // Token by token: tokens lie pages apart in x, and would push each other out of the cache.
      for (int64_t token = tile * Width; token < last_token; ++token)
        for (int64_t column = first; column < std::min(a.columns, first + kBits); ++column)
          copy(x[token * a.columns + column], out + (column - first) * Width + place<P>(token - tile * Width));
    }
    Unpacked<P> unpacked;
    Buffer products(tiles * kRowBlock * Width);
#pragma omp for schedule(dynamic)
    for (int64_t first = 0; first < a.rows; first += kRowBlock) {
      const int64_t last = std::min(a.rows, first + kRowBlock);
      multiply_rows<V, Width>(a, first, last, packed, tiles, unpacked, products.data());
      for (int64_t token = 0; token < tokens; ++token) {
        const float* from = products.data() + token / Width * kRowBlock * Width + token % Width;
        for (int64_t row = first; row < last; ++row) {
          const float product = from[(row - first) * Width];
          store(a.scales ? product * a.scales[row] : product, y + token * a.rows + row);
        }
      }
    }
  }
}

// As many tokens at a time as products and inputs leave room for in a level-2 cache.
constexpr int64_t kTokenBlock = 512;

template <typename X> void multiply(const NtMatrix& a, const X* x, X* y, int64_t tokens) {
  for (int64_t taken; tokens > 0; tokens -= taken) {
    taken = std::min(tokens, kTokenBlock);
    if (taken <= kFewTokens) {
      multiply_few(a, x, y, taken);
    } else {
      with_type(a.type, [&](auto value) {
        using V = decltype(value);
        taken <= 32 ? multiply_tiles<V, 32>(a, x, y, taken) : multiply_tiles<V, 64>(a, x, y, taken);
      });
    }
    x += taken * a.columns;
    y += taken * a.rows;
  }
}

// The values as a matrix [rows, columns].
template <typename V, typename Out> void to_dense(const NtMatrix& a, Out* out) {
  const int64_t words = words_per_row(a.columns);
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < a.rows; ++row) {
    const V* values = static_cast<const V*>(a.values) + a.starts[row];
    Out* to = out + row * a.columns;
    if (a.bitmap == nullptr) {
      for (int64_t column = 0; column < a.columns; ++column) store(to_float(values[column]), to + column);
    } else {
      std::memset(to, 0, sizeof(Out) * a.columns);
      for (int64_t word = 0; word < words; ++word)
        for (uint32_t bits = a.bitmap[row * words + word]; bits; bits &= bits - 1)
          store(to_float(*values++), to + word * kBits + __builtin_ctz(bits));
    }
  }
}

}  // namespace
