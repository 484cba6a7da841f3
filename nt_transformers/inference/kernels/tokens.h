// Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
//
// Several tokens: Y = A X, tokens along the vector registers.
//
// Each weight that exists is unpacked once for all tokens, and then multiplied with a row of 16 * Registers tokens of X.
// The part of X that a block of columns needs for so many tokens stays in a level-1 cache while many rows of A use it.

#pragma once

#include "vector.h"

namespace {

constexpr int64_t kRowBlock = 128;

// Columns at a time, so that their part of X takes 32 KB.
template <int Registers> constexpr int64_t kColumnBlock = Registers >= 4 ? 512 / Registers : 128;

// The existing weights of one block of rows and columns, row by row.
class Unpacked {
 public:
  explicit Unpacked(int64_t columns) : values_(kRowBlock * columns + kBits), columns_((kRowBlock * columns + kBits) / 2) {}

  void clear() { ends_[0] = count_ = 0; }
  void end_row(int64_t row) { ends_[row + 1] = count_; }
  int64_t begin(int64_t row) const { return ends_[row]; }
  int64_t end(int64_t row) const { return ends_[row + 1]; }
  const float* values() const { return values_.data(); }
  const uint16_t* columns() const { return reinterpret_cast<const uint16_t*>(columns_.data()); }

  // Adds the weights of one word of the bitmap, whose first column is `first`.
  template <typename V> void add(uint32_t bits, const V* from, int64_t first) {
    float* values = values_.data() + count_;
    uint16_t* columns = reinterpret_cast<uint16_t*>(columns_.data()) + count_;
    const int added = __builtin_popcount(bits);
#if NT_AVX512
    alignas(64) static const uint16_t kCount[32] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                                    16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
    const __m512i places = _mm512_add_epi16(_mm512_load_si512(kCount), _mm512_set1_epi16(static_cast<short>(first)));
    _mm512_storeu_si512(columns, _mm512_maskz_compress_epi16(bits, places));
    widen(from, values);
    if (added > 16) widen(from + 16, values + 16);
#else
    for (; bits; bits &= bits - 1) {
      *columns++ = static_cast<uint16_t>(first + __builtin_ctz(bits));
      *values++ = to_float(*from++);
    }
#endif
    count_ += added;
  }

 private:
  Buffer values_, columns_;
  int64_t ends_[kRowBlock + 1];
  int64_t count_ = 0;

#if NT_AVX512
  static __m256i load16(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
  static void widen(const BFloat16* from, float* to) {
    const __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(load16(from)), 16);
    _mm512_storeu_ps(to, _mm512_castsi512_ps(wide));
  }
  static void widen(const Float16* from, float* to) { _mm512_storeu_ps(to, _mm512_cvtph_ps(load16(from))); }
  static void widen(const int8_t* from, float* to) {
    const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    _mm512_storeu_ps(to, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(packed)));
  }
  static void widen(const float* from, float* to) { _mm512_storeu_ps(to, _mm512_loadu_ps(from)); }
#endif
};

// Adds the weights of one row times their rows of `x` [columns, tokens] to `y` [tokens]; tokens = 16 * Registers.
template <int Registers>
void accumulate(const float* values, const uint16_t* columns, int64_t count, const float* x, float* y) {
  // Enough independent sums to hide the latency of an addition.
  constexpr int chains = Registers >= 4 ? 1 : 4 / Registers;
  Lanes sums[chains][Registers] = {};
  const auto add = [&](Lanes* sum, int64_t i) {
    const float* x_row = x + columns[i] * (Registers * kLanes);
    const float value = values[i];
    for (int r = 0; r < Registers; ++r) sum[r] += value * *reinterpret_cast<const Lanes*>(x_row + r * kLanes);
  };
  int64_t i = 0;
  for (; i + chains <= count; i += chains)
    for (int chain = 0; chain < chains; ++chain) add(sums[chain], i + chain);
  for (; i < count; ++i) add(sums[0], i);
  for (int r = 0; r < Registers; ++r) {
    for (int chain = 1; chain < chains; ++chain) sums[0][r] += sums[chain][r];
    *reinterpret_cast<Lanes*>(y + r * kLanes) += sums[0][r];
  }
}

// A block of rows for all tiles: y [tiles, kRowBlock, width] = A[rows] x [tiles, columns, width].
template <typename V, int Registers>
void multiply_rows(const NtMatrix& a, int64_t first, int64_t last, const float* x, int64_t tiles, Unpacked& unpacked,
                   float* y) {
  constexpr int64_t width = Registers * kLanes, step = kColumnBlock<Registers> / kBits;
  const int64_t words = words_per_row(a.columns);
  const V* next[kRowBlock];
  for (int64_t row = first; row < last; ++row) next[row - first] = static_cast<const V*>(a.values) + a.starts[row];
  std::memset(y, 0, sizeof(float) * tiles * kRowBlock * width);
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
      const float* x_block = x + (tile * words + begin) * kBits * width;
      float* y_block = y + tile * kRowBlock * width;
      for (int64_t row = 0; row < last - first; ++row) {
        const int64_t from = unpacked.begin(row);
        accumulate<Registers>(unpacked.values() + from, unpacked.columns() + from, unpacked.end(row) - from, x_block,
                              y_block + row * width);
      }
    }
  }
}

// Y [tokens, rows] = X [tokens, columns] A^T.
template <typename V, int Registers> void multiply_tiles(const NtMatrix& a, const float* x, float* y, int64_t tokens) {
  constexpr int64_t width = Registers * kLanes;
  const int64_t words = words_per_row(a.columns), tiles = (tokens + width - 1) / width;
  Buffer packed(tiles * words * kBits * width);
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (int64_t part = 0; part < tiles * words; ++part) {
      const int64_t tile = part / words, first = part % words * kBits;
      const int64_t last_token = std::min(tokens, (tile + 1) * width);
      float* out = packed.data() + part * kBits * width;
      std::memset(out, 0, sizeof(float) * kBits * width);
      // Token by token: tokens lie pages apart in x, and would push each other out of the cache.
      for (int64_t token = tile * width; token < last_token; ++token)
        for (int64_t column = first; column < std::min(a.columns, first + kBits); ++column)
          out[(column - first) * width + token - tile * width] = x[token * a.columns + column];
    }
    Unpacked unpacked(kColumnBlock<Registers>);
    Buffer products(tiles * kRowBlock * width);
#pragma omp for schedule(dynamic)
    for (int64_t first = 0; first < a.rows; first += kRowBlock) {
      const int64_t last = std::min(a.rows, first + kRowBlock);
      multiply_rows<V, Registers>(a, first, last, packed.data(), tiles, unpacked, products.data());
      for (int64_t token = 0; token < tokens; ++token) {
        const float* from = products.data() + token / width * kRowBlock * width + token % width;
        for (int64_t row = first; row < last; ++row) {
          const float product = from[(row - first) * width];
          y[token * a.rows + row] = a.scales ? product * a.scales[row] : product;
        }
      }
    }
  }
}

// As many tokens at a time as products and inputs leave room for in a level-2 cache.
constexpr int64_t kTokenBlock = 512;

template <typename V> void multiply(const NtMatrix& a, const float* x, float* y, int64_t tokens) {
  while (tokens > 0) {
    const int64_t taken = tokens <= 2 ? 1 : std::min(tokens, kTokenBlock);
    if (taken == 1) {
      multiply_vector(a, x, y);
    } else if (taken <= 16) {
      multiply_tiles<V, 1>(a, x, y, taken);
    } else if (taken <= 32) {
      multiply_tiles<V, 2>(a, x, y, taken);
    } else {
      multiply_tiles<V, 4>(a, x, y, taken);
    }
    x += taken * a.columns;
    y += taken * a.rows;
    tokens -= taken;
  }
}

// The matrix [rows, columns] as float32.
template <typename V> void to_dense(const NtMatrix& a, float* out) {
  const int64_t words = words_per_row(a.columns);
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < a.rows; ++row) {
    const V* values = static_cast<const V*>(a.values) + a.starts[row];
    float* to = out + row * a.columns;
    if (a.bitmap == nullptr) {
      for (int64_t column = 0; column < a.columns; ++column) to[column] = to_float(values[column]);
    } else {
      std::memset(to, 0, sizeof(float) * a.columns);
      for (int64_t word = 0; word < words; ++word)
        for (uint32_t bits = a.bitmap[row * words + word]; bits; bits &= bits - 1)
          to[word * kBits + __builtin_ctz(bits)] = to_float(*values++);
    }
    if (a.scales)
      for (int64_t column = 0; column < a.columns; ++column) to[column] *= a.scales[row];
  }
}

}  // namespace
