// Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
//
// Compares the kernels with a naive product on random matrices, all memory allocated to the byte; built with
// sanitizers by test_sanitizers.py. Prints the number of products.

#include "kernels.cpp"

#include <cstdio>
#include <memory>
#include <random>
#include <vector>

namespace {

std::mt19937 generator(0);

int64_t draw(int64_t lowest, int64_t highest) {
  return std::uniform_int_distribution<int64_t>(lowest, highest)(generator);
}
float normal() { return std::normal_distribution<float>()(generator); }

void convert(float from, float& to) { to = from; }
void convert(float from, int8_t& to) { to = static_cast<int8_t>(std::lround(std::clamp(from, -4.0f, 4.0f) * 31)); }
void convert(float from, BFloat16& to) { store(from, &to); }
void convert(float from, Float16& to) {  // truncated, of normal magnitude
  uint32_t bits;
  std::memcpy(&bits, &from, sizeof bits);
  const int exponent = static_cast<int>(bits >> 23 & 0xff) - 112;
  to.bits = exponent <= 0 ? 0 : static_cast<uint16_t>((bits >> 16 & 0x8000) | exponent << 10 | (bits >> 13 & 0x3ff));
}

template <typename V> struct Random {
  std::vector<uint32_t> bitmap;
  std::vector<unsigned char> bits, values;
  std::vector<int64_t> starts, sums;
  std::vector<float> scales, dense;
  std::vector<uint16_t> places;
  std::vector<int64_t> slice_starts;
  std::unique_ptr<uint8_t, decltype(&std::free)> slices{nullptr, std::free};
  NtMatrix matrix;

  Random(int64_t rows, int64_t columns, double density, bool sparse, Type type)
      : bitmap(rows * words_per_row(columns)), dense(rows * columns) {
    std::vector<V> kept;
    for (int64_t row = 0; row < rows; ++row) {
      starts.push_back(kept.size());
      scales.push_back(type == kInt8 ? 0.01f : 1.0f);
      int64_t sum = 0;
      for (int64_t column = 0; column < columns; ++column) {
        if (sparse && !std::bernoulli_distribution(density)(generator)) continue;
        V value;
        convert(normal(), value);
        kept.push_back(value);
        places.push_back(static_cast<uint16_t>(column));
        sum += static_cast<int64_t>(to_float(value));
        bitmap[row * words_per_row(columns) + column / kBits] |= 1u << column % kBits;
        dense[row * columns + column] = to_float(value) * scales[row];
      }
      sums.push_back(sum);
    }
    starts.push_back(kept.size());
    if constexpr (std::is_same_v<V, int8_t>) {
      std::vector<int64_t> added(rows);
      nt_sum_rows(kept.data(), starts.data(), rows, added.data());
      if (added != sums) std::printf("sums of rows differ\n"), std::exit(1);
    }
    places.resize(kept.size() + 8);
    values.resize(kept.size() * sizeof(V) + 64);
    if (!kept.empty()) std::memcpy(values.data(), kept.data(), kept.size() * sizeof(V));
    const bool scaled = type == kInt8;
    // At an odd address, as files may have it.
    bits.resize(bitmap.size() * sizeof(uint32_t) + 1);
    if (!bitmap.empty()) std::memcpy(bits.data() + 1, bitmap.data(), bits.size() - 1);
    matrix = {rows, columns, sparse ? reinterpret_cast<const NtWord*>(bits.data() + 1) : nullptr, values.data(), starts.data(),
              scaled ? scales.data() : nullptr, scaled ? sums.data() : nullptr,
              sparse && draw(0, 1) ? places.data() : nullptr, nullptr, nullptr, 0, 0, type};
    if (sparse && (type == kBFloat16 || type == kInt8)) slice();
  }

  void slice() {
    slice_starts.resize(matrix.rows / 16 + 2);
    const int64_t bytes = nt_measure_slices(&matrix, slice_starts.data(), draw(1, 8));
    matrix.slice_starts = slice_starts.data();
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, bytes)) std::abort();
    slices.reset(static_cast<uint8_t*>(memory));
    nt_slice(&matrix, slices.get(), 2);
    matrix.slices = slices.get();
  }
};

template <typename V> void check(Type type, int64_t rows, int64_t columns, double density, int64_t tokens) {
  const Random<V> random(rows, columns, density, density < 1 || draw(0, 1), type);
  std::vector<float> x(tokens * columns), y(tokens * rows), dense(rows * columns);
  for (float& value : x) value = normal();
  nt_multiply(&random.matrix, x.data(), y.data(), kFloat32, tokens, 2);
  nt_to_dense(&random.matrix, dense.data(), kFloat32, 2);
  for (int64_t i = 0; i < rows * columns; ++i) {
    const float weight = dense[i] * random.scales[i / columns];
    if (weight != random.dense[i]) std::printf("weight %g != %g\n", weight, random.dense[i]), std::exit(1);
  }
  std::vector<BFloat16> rounded(tokens * columns), products(tokens * rows), weights(rows * columns);
  for (int64_t i = 0; i < tokens * columns; ++i) store(x[i], &rounded[i]);
  nt_multiply(&random.matrix, rounded.data(), products.data(), kBFloat16, tokens, 2);
  nt_to_dense(&random.matrix, weights.data(), kBFloat16, 2);
  for (int64_t token = 0; token < tokens; ++token)
    for (int64_t row = 0; row < rows; ++row) {
      double expected = 0, expected_rounded = 0;
      for (int64_t column = 0; column < columns; ++column) {
        const double weight = random.dense[row * columns + column];
        expected += x[token * columns + column] * weight;
        expected_rounded += to_float(rounded[token * columns + column]) * weight;
      }
      // The result is a bfloat16, and some kernels take 16 bits of the largest activation.
      const float rounded_product = to_float(products[token * rows + row]);
      if (!(std::abs(rounded_product - expected_rounded) < 0x1p-8 * std::abs(expected_rounded) + 2e-4 * std::sqrt(columns))) {
        std::printf("bfloat16: type %d, %ld x %ld, density %g, %ld tokens: %g != %g\n", type, rows, columns, density,
                    tokens, rounded_product, expected_rounded);
        std::exit(1);
      }
      const float product = y[token * rows + row];
      if (!(std::abs(product - expected) < 1e-5 * (1 + std::abs(expected)) + 2e-6 * std::sqrt(columns))) {
        std::printf("type %d, %ld x %ld, density %g, %ld tokens: %g != %g\n", type, rows, columns, density, tokens,
                    product, expected);
        std::exit(1);
      }
    }
}

// Tokens of two texts through a small network, for the sanitizers alone: test_prompts.py compares the numbers.
// `shared`: all layers write over the same keys and values.
template <typename C> void decode_some(Type type, Type cache_type, int64_t length, int64_t backbone, bool shared) {
  constexpr int64_t hidden = 48, inner = 50, heads = 3, depth = 2, texts = 2;
  const int64_t layers = backbone + heads * depth, capacity = (shared ? 1 : 3) * length;
  std::vector<Random<int8_t>> int8;
  std::vector<Random<BFloat16>> bfloat16;
  int8.reserve(7 * layers), bfloat16.reserve(7 * layers);
  const auto matrix = [&](int64_t rows, int64_t columns) {
    if (type == kInt8) return int8.emplace_back(rows, columns, 0.3, true, type).matrix;
    return bfloat16.emplace_back(rows, columns, 0.3, true, type).matrix;
  };
  const std::vector<float> norm(hidden, 1), turn(texts * length * 16, 0.5f), stems(heads * texts * length * hidden, 0.1f);
  std::vector<NtLayer> plan_layers;
  std::vector<std::vector<C>> caches(2 * layers, std::vector<C>(texts * capacity * 16));
  std::vector<void*> keys, values;
  for (int64_t i = 0; i < layers; ++i) {
    plan_layers.push_back({matrix(48, hidden), matrix(16, hidden), matrix(16, hidden), matrix(hidden, 48),
                           matrix(inner, hidden), matrix(inner, hidden), matrix(hidden, inner), norm.data(),
                           norm.data()});
    const int64_t slot = shared ? 0 : i;
    keys.push_back(caches[2 * slot].data()), values.push_back(caches[2 * slot + 1].data());
  }
  const std::vector<const float*> norms(heads, norm.data());
  const NtPlan plan = {hidden, inner, 3, 1, 16, backbone, heads, depth, plan_layers.data(), norms.data(), 1e-6f, 0.25f,
                       cache_type == kBFloat16};
  const int64_t starts[texts] = {0, length * 3 / 2};
  std::vector<float> out(heads * texts * length * hidden);
  for (int64_t filled = 0; filled + length <= capacity; filled += length) {
    const NtTokens tokens = {texts,  length, keys.data(), values.data(), capacity,
                             filled, starts, turn.data(), turn.data(),   cache_type};
    nt_decode(&plan, &tokens, stems.data(), out.data(), 2);
  }
  for (const float value : out)
    if (!std::isfinite(value)) std::printf("decoding: %g\n", value), std::exit(1);
}

}  // namespace

int main() {
  int products = 0;
  for (int round = 0; round < 6; ++round)
    for (const double density : {0.0, 0.02, 0.1, 0.3, 0.7, 1.0})
      for (const int64_t tokens : {int64_t{1}, int64_t{2}, draw(3, 16), draw(17, 32), draw(33, 64), draw(65, 140)}) {
        const int64_t rows = draw(1, 150), columns = draw(1, 300);
        check<BFloat16>(kBFloat16, rows, columns, density, tokens);
        check<Float16>(kFloat16, rows, columns, density, tokens);
        check<float>(kFloat32, rows, columns, density, tokens);
        check<int8_t>(kInt8, rows, columns, density, tokens);
        products += 4;
      }
  for (const Type type : {kBFloat16, kInt8})
    for (const int64_t length : {3, 20, 90, 600})
      for (const bool shared : {false, true}) {
        decode_some<BFloat16>(type, kBFloat16, length, draw(0, 1), shared);
        decode_some<float>(type, kFloat32, length, draw(0, 1), shared);
      }
  std::printf("%d products\n", products);
}
