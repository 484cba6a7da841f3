// Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
//
// The next token through all decoder layers of a LLaMA with ensemble heads, in one parallel region.

#pragma once

#include "vector.h"

extern "C" {

// A decoder layer of LLaMA.
struct NtLayer {
  NtMatrix query, key, value, output, gate, up, down;
  const float *attention_norm, *mlp_norm;  // [hidden]
};

// The decoder layers that make one token: a backbone, then heads of equal depth on its result.
struct NtPlan {
  int64_t hidden, intermediate, attention_heads, key_value_heads, head_size;
  int64_t backbone_depth, heads, head_depth;
  const NtLayer* layers;      // the backbone's, then those of each head
  const float* const* norms;  // [heads], final; null for none
  float epsilon, scaling;
};

}  // extern "C"

namespace {

// Sixteen numbers of a key-value cache.
inline Lanes load_lanes(const float* from) { return *reinterpret_cast<const Lanes*>(from); }
inline Lanes load_lanes(const BFloat16* from) {
  typedef uint16_t Halves __attribute__((vector_size(32), aligned(2), may_alias));
  typedef uint32_t Words __attribute__((vector_size(64)));
  return reinterpret_cast<Lanes>(__builtin_convertvector(*reinterpret_cast<const Halves*>(from), Words) << 16);
}
inline void store(float value, float* to) { *to = value; }
inline void store(float value, BFloat16* to) {  // to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  to->bits = static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float total(Lanes lanes) {
  typedef float Half __attribute__((vector_size(32)));
  typedef float Quarter __attribute__((vector_size(16)));
  Half halves[2];
  std::memcpy(halves, &lanes, sizeof lanes);
  const Half half = halves[0] + halves[1];
  Quarter quarters[2];
  std::memcpy(quarters, &half, sizeof half);
  const Quarter quarter = quarters[0] + quarters[1];
  return (quarter[0] + quarter[1]) + (quarter[2] + quarter[3]);
}

// e^x to within 2 ulp for x from -87 to 88, and the nearer of the two ends beyond.
inline Lanes exponential(Lanes x) {
  typedef int32_t Ints __attribute__((vector_size(64)));
  x = x < -87.0f ? Lanes{} - 87.0f : x;
  x = x > 88.0f ? Lanes{} + 88.0f : x;
  // x = n ln 2 + r; adding 1.5 * 2^23 rounds to a whole number.
  constexpr float magic = 0x1.8p23f;
  const Lanes n = (x * 1.44269504f + magic) - magic;
  const Lanes r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Lanes sum = Lanes{} + 1.0f / 5040;
  for (const float term : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) sum = sum * r + term;
  const Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
  return sum * reinterpret_cast<Lanes>(power);
}

void normalize(const float* x, const float* weight, int64_t size, float epsilon, float* out) {
  const int64_t whole = size / kLanes * kLanes;
  Lanes squares = {};
  for (int64_t i = 0; i < whole; i += kLanes) squares += load_lanes(x + i) * load_lanes(x + i);
  float square = total(squares);
  for (int64_t i = whole; i < size; ++i) square += x[i] * x[i];
  const float scale = 1 / std::sqrt(square / size + epsilon);
  for (int64_t i = 0; i < size; ++i) out[i] = x[i] * scale * weight[i];
}

// Rotary embedding, in the layout of transformers: the first half of a head turns with the second.
void rotate(const float* x, const float* cosine, const float* sine, int64_t size, float* out) {
  const int64_t half = size / 2;
  for (int64_t i = 0; i < half; ++i) {
    out[i] = x[i] * cosine[i] - x[half + i] * sine[i];
    out[half + i] = x[half + i] * cosine[half + i] + x[i] * sine[half + i];
  }
}

// 16 * Registers numbers of the weighted mean of `values` [length, size].
template <typename C, int Registers>
void mix(const float* weights, const C* values, int64_t length, int64_t size, float weight, float* out) {
  Lanes sums[Registers] = {};
  for (int64_t t = 0; t < length; ++t)
    for (int r = 0; r < Registers; ++r) sums[r] += weights[t] * load_lanes(values + t * size + r * kLanes);
  for (int r = 0; r < Registers; ++r) *reinterpret_cast<Lanes*>(out + r * kLanes) = sums[r] / weight;
}

// Softmax attention of one query over `length` keys and values [length, size]; `scores` has room for 16 more.
template <typename C>
void attend(const float* query, const C* keys, const C* values, int64_t length, int64_t size, float scaling,
            float* scores, float* out) {
  float highest = -INFINITY;
  for (int64_t t = 0; t < length; ++t) {
    Lanes sum = {};
    for (int64_t i = 0; i < size; i += kLanes) sum += load_lanes(query + i) * load_lanes(keys + t * size + i);
    scores[t] = total(sum) * scaling;
    highest = std::max(highest, scores[t]);
  }
  std::fill(scores + length, scores + round_up(length, kLanes), -INFINITY);
  Lanes weights = {};
  for (int64_t t = 0; t < length; t += kLanes) {
    Lanes& part = *reinterpret_cast<Lanes*>(scores + t);
    weights += part = exponential(part - highest);
  }
  const float weight = total(weights);
  constexpr int registers = 4;
  int64_t i = 0;
  for (; i + registers * kLanes <= size; i += registers * kLanes)
    mix<C, registers>(scores, values + i, length, size, weight, out + i);
  for (; i < size; i += kLanes) mix<C, 1>(scores, values + i, length, size, weight, out + i);
}

// gate / (1 + e^-gate) * up, to whole registers.
void swiglu(const float* gate, const float* up, int64_t size, float* out) {
  for (int64_t i = 0; i < size; i += kLanes) {
    const Lanes x = load_lanes(gate + i);
    *reinterpret_cast<Lanes*>(out + i) = x / (1.0f + exponential(-x)) * load_lanes(up + i);
  }
}

// Where one token's activations live between the phases, for each of `streams` networks side by side.
struct Activations {
  int64_t stride;
  Buffer query, key, value, attention, gate, up;
  Activations(const NtPlan& p, int64_t streams)
      : stride((std::max({p.hidden, p.intermediate, p.attention_heads * p.head_size}) + kBits - 1) / kBits * kBits),
        query(streams * stride), key(streams * stride), value(streams * stride), attention(streams * stride),
        gate(streams * stride), up(streams * stride) {}
};

// What each thread works with: all of them prepare the inputs of products, each for itself.
struct Scratch {
  Buffer x, scores;
  Input input;
  Scratch(int64_t width, int64_t length) : x(width), scores(round_up(length, kLanes)), input(width) {}
};

// One layer of all streams; `layers[s * apart]` belongs to stream s, as do slots `slot + s * apart` of the cache. The
// matrices that share an input have the same type of values.
template <typename C>
void decode_layer(const NtPlan& p, int64_t streams, const NtLayer* layers, int64_t apart, C* const* keys,
                  C* const* values, int64_t capacity, int64_t position, const float* cosine, const float* sine,
                  Activations& act, float* hidden, Scratch& scratch) {
  const int64_t size = p.head_size, group = p.attention_heads / p.key_value_heads;
  Input& input = scratch.input;
  for (int64_t s = 0; s < streams; ++s) {
    const NtLayer& layer = layers[s * apart];
    const int64_t base = s * act.stride;
    normalize(hidden + base, layer.attention_norm, p.hidden, p.epsilon, scratch.x.data());
    input.set(layer.query.type, scratch.x.data(), p.hidden);
    each_row(layer.query, input, [&](int64_t row, float value) { act.query.data()[base + row] = value; });
    each_row(layer.key, input, [&](int64_t row, float value) { act.key.data()[base + row] = value; });
    each_row(layer.value, input, [&](int64_t row, float value) { act.value.data()[base + row] = value; });
  }
#pragma omp barrier
#pragma omp for schedule(static)
  for (int64_t job = 0; job < streams * p.key_value_heads; ++job) {
    const int64_t s = job / p.key_value_heads, head = job % p.key_value_heads;
    C* const key = keys[s * apart] + head * capacity * size;
    C* const value = values[s * apart] + head * capacity * size;
    alignas(64) float turned[512];
    rotate(act.key.data() + s * act.stride + head * size, cosine, sine, size, turned);
    for (int64_t i = 0; i < size; ++i) {
      store(turned[i], key + position * size + i);
      store(act.value.data()[s * act.stride + head * size + i], value + position * size + i);
    }
    for (int64_t q = head * group; q < (head + 1) * group; ++q) {
      rotate(act.query.data() + s * act.stride + q * size, cosine, sine, size, turned);
      attend(turned, key, value, position + 1, size, p.scaling, scratch.scores.data(),
             act.attention.data() + s * act.stride + q * size);
    }
  }
  for (int64_t s = 0; s < streams; ++s) {
    const int64_t base = s * act.stride;
    const NtMatrix& output = layers[s * apart].output;
    input.set(output.type, act.attention.data() + base, output.columns);
    each_row(output, input, [&](int64_t row, float value) { hidden[base + row] += value; });
  }
#pragma omp barrier
  for (int64_t s = 0; s < streams; ++s) {
    const NtLayer& layer = layers[s * apart];
    const int64_t base = s * act.stride;
    normalize(hidden + base, layer.mlp_norm, p.hidden, p.epsilon, scratch.x.data());
    input.set(layer.gate.type, scratch.x.data(), p.hidden);
    each_row(layer.gate, input, [&](int64_t row, float value) { act.gate.data()[base + row] = value; });
    each_row(layer.up, input, [&](int64_t row, float value) { act.up.data()[base + row] = value; });
  }
#pragma omp barrier
  for (int64_t s = 0; s < streams; ++s) {
    const int64_t base = s * act.stride;
    const NtMatrix& down = layers[s * apart].down;
    swiglu(act.gate.data() + base, act.up.data() + base, p.intermediate, scratch.x.data());
    input.set(down.type, scratch.x.data(), p.intermediate);
    each_row(down, input, [&](int64_t row, float value) { hidden[base + row] += value; });
  }
#pragma omp barrier
}

template <typename C>
void decode(const NtPlan& p, const float* stems, void* const* keys, void* const* values, int64_t capacity,
            int64_t position, const float* cosine, const float* sine, float* out) {
  Activations act(p, p.heads);
  Buffer hidden(p.heads * act.stride);
  std::memset(hidden.data(), 0, sizeof(float) * p.heads * act.stride);
  const int64_t streams = p.backbone_depth ? 1 : p.heads;
  for (int64_t s = 0; s < streams; ++s)
    std::memcpy(hidden.data() + s * act.stride, stems + s * p.hidden, sizeof(float) * p.hidden);
  C* const* key_slots = reinterpret_cast<C* const*>(keys);
  C* const* value_slots = reinterpret_cast<C* const*>(values);
#pragma omp parallel
  {
    Scratch scratch(act.stride, position + 1);
    const auto layer = [&](int64_t streams_, int64_t slot, int64_t apart) {
      decode_layer(p, streams_, p.layers + slot, apart, key_slots + slot, value_slots + slot, capacity, position,
                   cosine, sine, act, hidden.data(), scratch);
    };
    for (int64_t i = 0; i < p.backbone_depth; ++i) layer(1, i, 0);
    if (p.backbone_depth) {
#pragma omp for schedule(static)
      for (int64_t head = 1; head < p.heads; ++head)
        std::memcpy(hidden.data() + head * act.stride, hidden.data(), sizeof(float) * p.hidden);
    }
    for (int64_t i = 0; i < p.head_depth; ++i) layer(p.heads, p.backbone_depth + i, p.head_depth);
  }
  for (int64_t head = 0; head < p.heads; ++head) {
    const float* const result = hidden.data() + head * act.stride;
    if (p.norms[head])
      normalize(result, p.norms[head], p.hidden, p.epsilon, out + head * p.hidden);
    else
      std::memcpy(out + head * p.hidden, result, sizeof(float) * p.hidden);
  }
}

}  // namespace

