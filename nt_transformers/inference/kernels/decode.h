// Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
//
// A few tokens through all decoder layers of a LLaMA with ensemble heads, in one parallel region.

#pragma once

#include "vector.h"

extern "C" {

// A decoder layer of LLaMA.
struct NtLayer {
  NtMatrix query, key, value, output, gate, up, down;
  const float *attention_norm, *mlp_norm;  // [hidden]
};

// Decoder layers: a backbone, then heads of equal depth on its result.
struct NtPlan {
  int64_t hidden, intermediate, attention_heads, key_value_heads, head_size;
  int64_t backbone_depth, heads, head_depth;
  const NtLayer* layers;      // the backbone's, then those of each head
  const float* const* norms;  // [heads], final; null for none
  float epsilon, scaling;
  int32_t rounds;  // whether activations are those of a bfloat16 model
};

// New tokens of some texts, of equal number in each.
struct NtTokens {
  int64_t texts, length;
  // For each layer [texts, key_value_heads, capacity, head_size] in bfloat16 (`type` 0) or float32 (2), of which
  // `filled` entries are there; from `starts` [texts] on, they are no padding.
  void* const* keys;
  void* const* values;
  int64_t capacity, filled;
  const int64_t* starts;
  const float *cosine, *sine;  // [texts * length, head_size]
  int32_t type;
};

}  // extern "C"

namespace {

template <int N> float total(typename Vector<float, N>::Type lanes) {
  if constexpr (N == 4) {
    return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
  } else {
    typename Vector<float, N / 2>::Type halves[2];
    std::memcpy(halves, &lanes, sizeof lanes);
    return total<N / 2>(halves[0] + halves[1]);
  }
}

// e^x to within 2 ulp for x from -87 to 88, and the nearer of the two ends beyond.
inline Lanes exponential(Lanes x) {
  using Ints = Vector<int32_t, kLanes>::Type;
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
  float square = total<kLanes>(squares);
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

// kLanes * Registers numbers of the weighted mean of `values` [length, size].
template <typename C, int Registers>
void mix(const float* weights, const C* values, int64_t length, int64_t size, float weight, float* out) {
  Lanes sums[Registers] = {};
  for (int64_t t = 0; t < length; ++t)
    for (int r = 0; r < Registers; ++r) sums[r] += weights[t] * load_lanes(values + t * size + r * kLanes);
  for (int r = 0; r < Registers; ++r) *reinterpret_cast<Lanes*>(out + r * kLanes) = sums[r] / weight;
}

// Softmax attention of one query over `length` keys and values [length, size]; `scores` has room for kLanes more.
template <typename C>
void attend(const float* query, const C* keys, const C* values, int64_t length, int64_t size, float scaling,
            float* scores, float* out) {
  float highest = -INFINITY;
  for (int64_t t = 0; t < length; ++t) {
    Lanes sum = {};
    for (int64_t i = 0; i < size; i += kLanes) sum += load_lanes(query + i) * load_lanes(keys + t * size + i);
    scores[t] = total<kLanes>(sum) * scaling;
    highest = std::max(highest, scores[t]);
  }
  std::fill(scores + length, scores + round_up(length, kLanes), -INFINITY);
  Lanes weights = {};
  for (int64_t t = 0; t < length; t += kLanes) {
    Lanes& part = *reinterpret_cast<Lanes*>(scores + t);
    weights += part = exponential(part - highest);
  }
  const float weight = total<kLanes>(weights);
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

// Decoding of some tokens: `layer` and what it calls run in a team of threads. C: type of the cache, X: of activations.
//
// Activations are [streams, tokens, stride]; streams are the heads, which run side by side, or the backbone alone.
template <typename C, typename X> class Decoding {
 public:
  Decoding(const NtPlan& plan, const NtTokens& tokens)
      : p_(plan), t_(tokens), count_(tokens.texts * tokens.length), inner_(plan.attention_heads * plan.head_size),
        stride_(round_up(std::max({plan.hidden, plan.intermediate, inner_}), kBits)), all_(plan.heads * count_),
        input_(stride_, all_), hidden_(all_ * stride_), query_(all_ * stride_), key_(all_ * stride_),
        value_(all_ * stride_), gate_(all_ * stride_), up_(all_ * stride_) {}

  // stems [streams, tokens, hidden] to out [heads, tokens, hidden].
  void run(const float* stems, float* out) {
    const int64_t streams = p_.backbone_depth ? 1 : p_.heads;
    for (int64_t i = 0; i < streams * count_; ++i)
      std::memcpy(at(hidden_, i), stems + i * p_.hidden, sizeof(float) * p_.hidden);
#pragma omp parallel
    {
      Scratch scratch(stride_, t_.filled + t_.length);
      for (int64_t i = 0; i < p_.backbone_depth; ++i) layer(1, i, 0, scratch);
      if (p_.backbone_depth) {
#pragma omp for schedule(static)
        for (int64_t i = count_; i < all_; ++i)
          std::memcpy(at(hidden_, i), at(hidden_, i % count_), sizeof(float) * p_.hidden);
      }
      for (int64_t i = 0; i < p_.head_depth; ++i) layer(p_.heads, p_.backbone_depth + i, p_.head_depth, scratch);
#pragma omp for schedule(static)
      for (int64_t i = 0; i < all_; ++i) {
        if (const float* norm = p_.norms[i / count_])
          normalize(at(hidden_, i), norm, p_.hidden, p_.epsilon, out + i * p_.hidden);
        else
          std::memcpy(out + i * p_.hidden, at(hidden_, i), sizeof(float) * p_.hidden);
      }
    }
  }

 private:
  struct Scratch {
    Buffer x, turned, scores;
    Scratch(int64_t stride, int64_t length) : x(stride), turned(stride), scores(length + kLanes) {}
  };

  float* at(Buffer& activations, int64_t index) const { return activations.data() + index * stride_; }

  // The inputs of products with `matrix(stream)`, which `fill(stream, index, x)` computes.
  template <typename Matrix, typename Fill>
  void prepare(int64_t streams, Scratch& scratch, Matrix&& matrix, Fill&& fill) {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < streams * count_; ++i) {
      fill(i / count_, i, scratch.x.data());
      input_.template set<X>(matrix(i / count_), count_, i, scratch.x.data());
    }
  }

  // Calls `take(output, value)` for each number in `out` that belongs to a product of `matrix` with a stream.
  template <typename Take> void multiply(const NtMatrix& matrix, int64_t stream, Buffer& out, Take&& take) {
    const int64_t first = stream * count_;
    each_row<X>(matrix, input_, first, count_,
                [&](int64_t row, int64_t token, float value) { take(at(out, first + token)[row], value); });
  }

  // A layer of each stream: number `slot` of the plan for the first one, `apart` further on for each other.
  void layer(int64_t streams, int64_t slot, int64_t apart, Scratch& scratch) {
    const auto at_stream = [&](int64_t s) -> const NtLayer& { return p_.layers[slot + s * apart]; };
    const auto set = [](float& out, float value) { out = value; };
    const auto add = [](float& out, float value) { out += value; };
    const auto norm = [&](const float* weight, int64_t i, float* x) {
      normalize(at(hidden_, i), weight, p_.hidden, p_.epsilon, x);
    };
    prepare(streams, scratch, [&](int64_t s) -> const auto& { return at_stream(s).query; },
            [&](int64_t s, int64_t i, float* x) { norm(at_stream(s).attention_norm, i, x); });
    for (int64_t s = 0; s < streams; ++s) {
      multiply(at_stream(s).query, s, query_, set);
      multiply(at_stream(s).key, s, key_, set);
      multiply(at_stream(s).value, s, value_, set);
    }
#pragma omp barrier
#pragma omp for collapse(3) schedule(static)
    for (int64_t s = 0; s < streams; ++s)
      for (int64_t text = 0; text < t_.texts; ++text)
        for (int64_t head = 0; head < p_.key_value_heads; ++head) attention(slot + s * apart, s, text, head, scratch);
    prepare(streams, scratch, [&](int64_t s) -> const auto& { return at_stream(s).output; },
            [&](int64_t, int64_t i, float* x) { std::memcpy(x, at(query_, i), sizeof(float) * inner_); });
    for (int64_t s = 0; s < streams; ++s) multiply(at_stream(s).output, s, hidden_, add);
#pragma omp barrier
    prepare(streams, scratch, [&](int64_t s) -> const auto& { return at_stream(s).gate; },
            [&](int64_t s, int64_t i, float* x) { norm(at_stream(s).mlp_norm, i, x); });
    for (int64_t s = 0; s < streams; ++s) {
      multiply(at_stream(s).gate, s, gate_, set);
      multiply(at_stream(s).up, s, up_, set);
    }
#pragma omp barrier
    prepare(streams, scratch, [&](int64_t s) -> const auto& { return at_stream(s).down; },
            [&](int64_t, int64_t i, float* x) { swiglu(at(gate_, i), at(up_, i), p_.intermediate, x); });
    for (int64_t s = 0; s < streams; ++s) multiply(at_stream(s).down, s, hidden_, add);
#pragma omp barrier
  }

  // The new tokens of a text with one head of its keys and values, which they are added to; in place of the queries.
  void attention(int64_t slot, int64_t stream, int64_t text, int64_t head, Scratch& scratch) {
    const int64_t size = p_.head_size, group = p_.attention_heads / p_.key_value_heads;
    const int64_t entries = (text * p_.key_value_heads + head) * t_.capacity, start = t_.starts[text];
    C* const keys = static_cast<C*>(t_.keys[slot]) + entries * size;
    C* const values = static_cast<C*>(t_.values[slot]) + entries * size;
    float* const turned = scratch.turned.data();
    for (int64_t n = 0; n < t_.length; ++n) {
      const int64_t token = text * t_.length + n, index = stream * count_ + token, entry = t_.filled + n;
      const float *cosine = t_.cosine + token * size, *sine = t_.sine + token * size;
      rotate(at(key_, index) + head * size, cosine, sine, size, turned);
      for (int64_t i = 0; i < size; ++i) {
        store(turned[i], keys + entry * size + i);
        store(at(value_, index)[head * size + i], values + entry * size + i);
      }
      for (int64_t q = head * group; q < (head + 1) * group; ++q) {
        float* const query = at(query_, index) + q * size;
        rotate(query, cosine, sine, size, turned);
        if (entry < start)  // padding
          std::fill(query, query + size, 0.0f);
        else
          attend(turned, keys + start * size, values + start * size, entry + 1 - start, size, p_.scaling,
                 scratch.scores.data(), query);
      }
    }
  }

  const NtPlan& p_;
  const NtTokens& t_;
  const int64_t count_, inner_, stride_, all_;
  Input input_;
  Buffer hidden_, query_, key_, value_, gate_, up_;
};

}  // namespace
