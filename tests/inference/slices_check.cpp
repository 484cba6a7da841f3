// Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
//
// Compares products by slices of 64 lanes, as processors with AVX-512 compute them, with naive ones on random matrices.
// SIMDe stands in for the processor; built with sanitizers by test_sanitizers.py. Prints the number of products.

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#include "slices.h"

#include <cstdio>
#include <random>
#include <vector>

namespace {

static_assert(kChunk == 64 && kTable == 256);
std::mt19937 generator(0);

float normal() { return std::normal_distribution<float>()(generator); }
void draw(int8_t& value) { value = static_cast<int8_t>(std::clamp(30 * normal(), -127.0f, 127.0f)); }
void draw(BFloat16& value) { value = to_bfloat16(normal()); }

template <typename V, int Bits> void check(int64_t rows, int64_t columns, double density, int64_t threads) {
  const int64_t words = words_per_row(columns);
  std::vector<uint32_t> bitmap(rows * words);
  std::vector<V> values;
  std::vector<int64_t> starts;
  std::vector<double> dense(rows * columns);
  for (int64_t row = 0; row < rows; ++row) {
    starts.push_back(values.size());
    for (int64_t column = 0; column < columns; ++column) {
      if (!std::bernoulli_distribution(density)(generator)) continue;
      values.emplace_back();
      draw(values.back());
      bitmap[row * words + column / kBits] |= 1u << column % kBits;
      dense[row * columns + column] = to_float(values.back());
    }
  }
  NtMatrix a{};
  a.rows = rows, a.columns = columns, a.bitmap = bitmap.data(), a.values = values.data(), a.starts = starts.data();
  a.type = std::is_same_v<V, int8_t> ? kInt8 : kBFloat16, a.slice_bits = Bits, a.slice_chunks = chunks_of(rows, threads);
  const std::vector<int64_t> slice_starts = measure_slices(a);
  a.slice_starts = slice_starts.data();
  const int64_t step = a.slice_chunks * kChunk, blocks = slice_starts.size() - 1;
  Buffer slices(slice_starts[blocks] / sizeof(float)), planes(plane_bytes(columns) / sizeof(float));
  uint8_t* const begin = reinterpret_cast<uint8_t*>(slices.data());
  write_slices(a, begin);
  std::vector<BFloat16> x(columns);
  for (BFloat16& activation : x) draw(activation);
  to_planes(x.data(), columns, kUnit<V>, reinterpret_cast<uint8_t*>(planes.data()));
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = block * step, count = std::min(step, rows - first);
    float sums[kBlockRows] = {};
    const uint8_t* next = begin + slice_starts[block];
    for (int64_t column = 0; column < columns; column += kTable)
      next = add_block<V, Bits>(next, (count + kChunk - 1) / kChunk,
                                reinterpret_cast<uint8_t*>(planes.data()) + 2 * column, sums);
    if (next != begin + slice_starts[block + 1]) std::printf("a block ends elsewhere\n"), std::exit(1);
    for (int64_t row = 0; row < count; ++row) {
      double expected = 0;
      for (int64_t column = 0; column < columns; ++column)
        expected += to_float(x[column]) * dense[(first + row) * columns + column];
      const float product = sums[row];
      if (!(std::abs(product - expected) < 1e-4 * (1 + std::abs(expected)))) {
        std::printf("%ld x %ld, density %g: %g != %g\n", rows, columns, density, product, expected);
        std::exit(1);
      }
    }
  }
}

}  // namespace

int main() {
  int products = 0;
  for (int round = 0; round < 20; ++round)
    for (const double density : {0.0, 0.02, 0.2, 0.6, 1.0}) {
      const int64_t rows = 1 + generator() % 600, columns = 1 + generator() % 900, threads = 1 + generator() % 4;
      check<BFloat16, 8>(rows, columns, density, threads);
      check<BFloat16, 4>(rows, columns, density, threads);
      check<int8_t, 8>(rows, columns, density, threads);
      products += 3;
    }
  std::printf("%d products\n", products);
}
