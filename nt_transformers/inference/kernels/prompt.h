// Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
//
// Many tokens, as prompts have, through all decoder layers of a LLaMA with ensemble heads, in one parallel region.
//
// Activations are tiles of `Width` tokens of one text, [rows, Width]: tokens lie along the vector registers from the
// embeddings to the last norm, and only keys and values are transposed, for the cache.

#pragma once

#include "decode.h"
#include "tokens.h"

namespace {

// A row of a tile, as products of `P` read it.
template <int Width> void pack(const Lanes* row, float* out) {
  for (int v = 0; v < Width / kLanes; ++v) store_lanes(row[v], out + v * kLanes);
}
#if NT_BF16
template <int Width> void pack(const Lanes* row, BFloat16* out) {
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);  // see `place`
  for (int v = 0; v < Width / kLanes; v += 2) {
    const __m512bh both = _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(row[v + 1]), reinterpret_cast<__m512>(row[v]));
    _mm512_store_si512(out + v * kLanes, _mm512_permutexvar_epi64(order, reinterpret_cast<__m512i>(both)));
  }
}
#endif

// out [count, Width] += the sum over k < depth of a[i * row_step + k * step] b[k, Width]; `count` is a multiple of 4.
template <int Width>
void accumulate_outer(const float* a, int64_t row_step, int64_t step, const float* b, int64_t depth, int64_t count,
                      float* out) {
  constexpr int rows = 4, registers = 2;
  for (int64_t i = 0; i < count; i += rows)
    for (int w = 0; w < Width; w += registers * kLanes) {
      float* const to = out + i * Width + w;
      Lanes sums[rows][registers];
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < registers; ++v) sums[r][v] = load_lanes(to + r * Width + v * kLanes);
      for (int64_t k = 0; k < depth; ++k) {
        const float* const from = b + k * Width + w;
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
          for (int v = 0; v < registers; ++v)
            sums[r][v] += a[(i + r) * row_step + k * step] * load_lanes(from + v * kLanes);
      }
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < registers; ++v) store_lanes(sums[r][v], to + r * Width + v * kLanes);
    }
}

// Some texts; `layer` and what it calls run in a team of threads. P: type of what products read.
template <int Width, typename P> class Prompt {
 public:
  Prompt(const NtPlan& plan, const NtTokens& tokens, int64_t first_text, int64_t texts)
      : p_(plan), t_(tokens), first_text_(first_text), tiles_of_text_((tokens.length + Width - 1) / Width),
        tiles_(texts * tiles_of_text_), inner_(plan.attention_heads * plan.head_size),
        columns_(round_up(std::max({plan.hidden, plan.intermediate, inner_}), kBits)), shared_(tiles_, plan.hidden),
        hidden_(tiles_, plan.hidden), query_(tiles_, inner_), key_(tiles_, plan.key_value_heads * plan.head_size),
        value_(tiles_, plan.key_value_heads * plan.head_size), gate_(tiles_, plan.intermediate),
        up_(tiles_, plan.intermediate), cosine_(tiles_, plan.head_size), sine_(tiles_, plan.head_size),
        packed_(tiles_ * columns_ * Width * sizeof(P) / sizeof(float)) {}

  // stems [1 or heads, tokens, hidden] to out [heads, tokens, hidden], of which these texts are a part.
  void run(const float* stems, float* out) {
    const int64_t size = t_.texts * t_.length * p_.hidden;
#pragma omp parallel
    {
      Scratch scratch(p_);
      take(t_.cosine, cosine_);
      take(t_.sine, sine_);
      if (p_.backbone_depth) {
        take(stems, hidden_);
        for (int64_t i = 0; i < p_.backbone_depth; ++i) layer(i, scratch);
        each_tile([&](int64_t tile) { std::memcpy(shared_.row(tile, 0), hidden_.row(tile, 0), hidden_.bytes()); });
      }
      for (int64_t head = 0; head < p_.heads; ++head) {
        if (p_.backbone_depth)
          each_tile([&](int64_t tile) { std::memcpy(hidden_.row(tile, 0), shared_.row(tile, 0), hidden_.bytes()); });
        else
          take(stems + head * size, hidden_);
        for (int64_t i = 0; i < p_.head_depth; ++i) layer(p_.backbone_depth + head * p_.head_depth + i, scratch);
        give(p_.norms[head], out + head * size);
      }
    }
  }

 private:
  static constexpr int registers = Width / kLanes;
  static constexpr int64_t key_block = 64;  // keys at a time, so that they and their scores stay in a level-1 cache
  static constexpr float lowest = -1e30f;   // score of what a token does not see

  // Activations [tiles, rows, Width].
  struct Tiles {
    int64_t rows;
    Buffer data;
    Tiles(int64_t tiles, int64_t rows) : rows(rows), data(tiles * rows * Width) {}
    float* row(int64_t tile, int64_t row) { return data.data() + (tile * rows + row) * Width; }
    int64_t bytes() const { return rows * Width * sizeof(float); }
  };

  struct Scratch {
    Unpacked<P> unpacked;
    Buffer products, keys, scores, mixed;
    explicit Scratch(const NtPlan& plan)
        : products(kTokenBlock * kRowBlock), keys(key_block * plan.head_size), scores(key_block * Width),
          mixed(plan.head_size * Width) {}
  };

  template <typename F> void each_tile(F&& function) {
#pragma omp for schedule(static)
    for (int64_t tile = 0; tile < tiles_; ++tile) function(tile);
  }

  // The first token of a tile within its text, and among all; how many there are in the tile.
  int64_t offset(int64_t tile) const { return tile % tiles_of_text_ * Width; }
  int64_t text(int64_t tile) const { return first_text_ + tile / tiles_of_text_; }
  int64_t token(int64_t tile) const { return text(tile) * t_.length + offset(tile); }
  int64_t tokens(int64_t tile) const { return std::min<int64_t>(Width, t_.length - offset(tile)); }

  // From [tokens, rows]; zeros where a tile has fewer tokens.
  void take(const float* from, Tiles& to) {
    each_tile([&](int64_t tile) {
      if (tokens(tile) < Width) std::memset(to.row(tile, 0), 0, to.bytes());
      for (int64_t n = 0; n < tokens(tile); ++n)
        for (int64_t row = 0; row < to.rows; ++row) to.row(tile, row)[n] = from[(token(tile) + n) * to.rows + row];
    });
  }

  // The hidden states, after a norm unless it is null, to [tokens, hidden].
  void give(const float* norm, float* out) {
    each_tile([&](int64_t tile) {
      Lanes scales[registers];
      if (norm) inverse_norms(tile, scales);
      for (int64_t row = 0; row < p_.hidden; ++row) {
        const float* const from = hidden_.row(tile, row);
        for (int64_t n = 0; n < tokens(tile); ++n)
          out[(token(tile) + n) * p_.hidden + row] =
              norm ? from[n] * scales[n / kLanes][n % kLanes] * norm[row] : from[n];
      }
    });
  }

  void inverse_norms(int64_t tile, Lanes* scales) {
    Lanes squares[registers] = {};
    for (int64_t row = 0; row < p_.hidden; ++row)
      for (int v = 0; v < registers; ++v) {
        const Lanes part = load_lanes(hidden_.row(tile, row) + v * kLanes);
        squares[v] += part * part;
      }
    for (int v = 0; v < registers; ++v)
      for (int i = 0; i < kLanes; ++i) scales[v][i] = 1 / std::sqrt(squares[v][i] / p_.hidden + p_.epsilon);
  }

  P* packed(int64_t tile, int64_t columns) {
    return reinterpret_cast<P*>(packed_.data()) + tile * words_per_row(columns) * kBits * Width;
  }

  // The inputs of products with matrices of `columns`: `fill(tile, column, row)` computes a row of a tile.
  template <typename Fill> void prepare(int64_t columns, Fill&& fill) {
    each_tile([&](int64_t tile) {
      fill(tile, [&](int64_t column, const Lanes* row) { pack<Width>(row, packed(tile, columns) + column * Width); });
    });
  }

  void prepare_norm(const float* weight) {
    prepare(p_.hidden, [&](int64_t tile, auto put) {
      Lanes scales[registers], row[registers];
      inverse_norms(tile, scales);
      for (int64_t column = 0; column < p_.hidden; ++column) {
        for (int v = 0; v < registers; ++v)
          row[v] = load_lanes(hidden_.row(tile, column) + v * kLanes) * scales[v] * weight[column];
        put(column, row);
      }
    });
  }

  // out = or += the products of a matrix with the inputs; returns without waiting for other threads.
  template <bool Add> void multiply(const NtMatrix& a, Tiles& out, Scratch& scratch) {
    constexpr int64_t block = kTokenBlock / Width;
#pragma omp for schedule(dynamic) nowait
    for (int64_t first = 0; first < a.rows; first += kRowBlock) {
      const int64_t last = std::min(a.rows, first + kRowBlock);
      for (int64_t begin = 0; begin < tiles_; begin += block) {
        const int64_t end = std::min(tiles_, begin + block);
        with_type(a.type, [&](auto value) {
          using V = decltype(value);
          // No other values come with this P: `nt_decode` chooses it by them.
          constexpr bool exact = std::is_same_v<V, BFloat16> || std::is_same_v<V, int8_t>;
          if constexpr (exact || std::is_same_v<P, float>)
            multiply_rows<V, Width>(a, first, last, packed(begin, a.columns), end - begin, scratch.unpacked,
                                    scratch.products.data());
        });
        for (int64_t tile = begin; tile < end; ++tile)
          for (int64_t row = first; row < last; ++row) {
            const float* from = scratch.products.data() + ((tile - begin) * kRowBlock + row - first) * Width;
            const float scale = a.scales ? a.scales[row] : 1;
            for (int v = 0; v < registers; ++v) {
              Lanes& to = *reinterpret_cast<Lanes*>(out.row(tile, row) + v * kLanes);
              const Lanes product = load_lanes(from + v * kLanes) * scale;
              to = Add ? to + product : product;
            }
          }
      }
    }
  }

  // Layer number `slot` of the plan and of the cache.
  void layer(int64_t slot, Scratch& scratch) {
    const NtLayer& l = p_.layers[slot];
    prepare_norm(l.attention_norm);
    multiply<false>(l.query, query_, scratch);
    multiply<false>(l.key, key_, scratch);
    multiply<false>(l.value, value_, scratch);
#pragma omp barrier
    t_.type == kBFloat16 ? attention<BFloat16>(slot, scratch) : attention<float>(slot, scratch);
    prepare(inner_, [&](int64_t tile, auto put) {
      for (int64_t row = 0; row < inner_; ++row) put(row, reinterpret_cast<const Lanes*>(query_.row(tile, row)));
    });
    multiply<true>(l.output, hidden_, scratch);
#pragma omp barrier
    prepare_norm(l.mlp_norm);
    multiply<false>(l.gate, gate_, scratch);
    multiply<false>(l.up, up_, scratch);
#pragma omp barrier
    prepare(p_.intermediate, [&](int64_t tile, auto put) {
      Lanes row[registers];
      for (int64_t i = 0; i < p_.intermediate; ++i) {
        swiglu(gate_.row(tile, i), up_.row(tile, i), Width, reinterpret_cast<float*>(row));
        put(i, row);
      }
    });
    multiply<true>(l.down, hidden_, scratch);
#pragma omp barrier
  }

  // Adds the new keys and values to the cache, of type C, and replaces the queries by what they attend to.
  template <typename C> void attention(int64_t slot, Scratch& scratch) {
#pragma omp for collapse(2) schedule(static)
    for (int64_t tile = 0; tile < tiles_; ++tile)
      for (int64_t head = 0; head < p_.key_value_heads; ++head) {
        rotate_tile(tile, key_.row(tile, head * p_.head_size));
        add_to_cache(tile, key_.row(tile, head * p_.head_size), entries<C>(t_.keys[slot], tile, head));
        add_to_cache(tile, value_.row(tile, head * p_.head_size), entries<C>(t_.values[slot], tile, head));
      }
    // The last tiles of a text see the most keys.
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t tile = tiles_ - 1; tile >= 0; --tile)
      for (int64_t head = 0; head < p_.attention_heads; ++head) {
        const int64_t shared = head / (p_.attention_heads / p_.key_value_heads);
        float* const query = query_.row(tile, head * p_.head_size);
        rotate_tile(tile, query);
        attend_tile(tile, entries<C>(t_.keys[slot], tile, shared), entries<C>(t_.values[slot], tile, shared), query,
                    scratch);
      }
  }

  // A layer's keys or values of a tile's text and one of its heads, [capacity, head_size].
  template <typename C> C* entries(void* cache, int64_t tile, int64_t head) const {
    return static_cast<C*>(cache) + (text(tile) * p_.key_value_heads + head) * t_.capacity * p_.head_size;
  }

  template <typename C> void add_to_cache(int64_t tile, const float* from, C* entries) {
    for (int64_t n = 0; n < tokens(tile); ++n)
      for (int64_t i = 0; i < p_.head_size; ++i)
        store(from[i * Width + n], entries + (t_.filled + offset(tile) + n) * p_.head_size + i);
  }

  // As `rotate`, for [head_size, Width], in place.
  void rotate_tile(int64_t tile, float* x) {
    const int64_t half = p_.head_size / 2 * Width;
    const float *cosine = cosine_.row(tile, 0), *sine = sine_.row(tile, 0);
    for (int64_t i = 0; i < half; i += kLanes) {
      const Lanes first = load_lanes(x + i), second = load_lanes(x + half + i);
      store_lanes(first * load_lanes(cosine + i) - second * load_lanes(sine + i), x + i);
      store_lanes(second * load_lanes(cosine + half + i) + first * load_lanes(sine + half + i), x + half + i);
    }
  }

  // Softmax attention of a tile's tokens, each over the keys and values up to its own; in place of the queries
  // [head_size, Width]. Block after block of keys, the sums so far rescaled to the largest score so far (online
  // softmax: Milakov and Gimelshein 2018, arXiv:1805.02867).
  template <typename C> void attend_tile(int64_t tile, const C* keys, const C* values, float* query, Scratch& scratch) {
    const int64_t size = p_.head_size, own = t_.filled + offset(tile), end = own + tokens(tile);
    float* const mixed = scratch.mixed.data();
    std::memset(mixed, 0, sizeof(float) * size * Width);
    Lanes highest[registers], sums[registers] = {};
    for (Lanes& high : highest) high = Lanes{} + lowest;
    for (int64_t first = t_.starts[text(tile)]; first < end; first += key_block) {
      const int64_t count = std::min(key_block, end - first);
      widen(keys + first * size, count, scratch.keys.data());
      std::memset(scratch.scores.data(), 0, sizeof(float) * round_up(count, 4) * Width);
      accumulate_outer<Width>(scratch.keys.data(), size, 1, query, size, round_up(count, 4), scratch.scores.data());
      for (int v = 0; v < registers; ++v)
        weigh(scratch.scores.data() + v * kLanes, count, first - own - v * kLanes, highest[v], sums[v],
              mixed + v * kLanes);
      widen(values + first * size, count, scratch.keys.data());
      accumulate_outer<Width>(scratch.keys.data(), 1, size, scratch.scores.data(), count, size, mixed);
    }
    for (Lanes& sum : sums) sum = sum > 0.0f ? sum : Lanes{} + 1.0f;  // a tile of padding sees nothing
    for (int64_t i = 0; i < size; ++i)
      for (int v = 0; v < registers; ++v)
        store_lanes(load_lanes(mixed + i * Width + v * kLanes) / sums[v], query + i * Width + v * kLanes);
  }

  // Some keys or values as float32, and zeros to a multiple of four.
  template <typename C> void widen(const C* from, int64_t count, float* to) const {
    for (int64_t i = 0; i < count * p_.head_size; i += kLanes) store_lanes(load_lanes(from + i), to + i);
    std::memset(to + count * p_.head_size, 0, sizeof(float) * (round_up(count, 4) - count) * p_.head_size);
  }

  // Scores [count, kLanes of Width] to weights: lane n sees those up to `n - ahead`. Rescales what has been mixed so far.
  void weigh(float* scores, int64_t count, int64_t ahead, Lanes& highest, Lanes& sum, float* mixed) const {
    Lanes lanes;
    for (int i = 0; i < kLanes; ++i) lanes[i] = static_cast<float>(i);
    const Lanes before = highest;
    for (int64_t t = 0; t < count; ++t) {
      Lanes& score = *reinterpret_cast<Lanes*>(scores + t * Width);
      score = lanes < static_cast<float>(ahead + t) ? Lanes{} + lowest : score * p_.scaling;
      highest = highest > score ? highest : score;
    }
    const Lanes change = exponential(before - highest);
    sum *= change;
    for (int64_t t = 0; t < count; ++t) {
      Lanes& weight = *reinterpret_cast<Lanes*>(scores + t * Width);
      sum += weight = exponential(weight - highest);
    }
    for (int64_t i = 0; i < p_.head_size; ++i) *reinterpret_cast<Lanes*>(mixed + i * Width) *= change;
  }

  const NtPlan& p_;
  const NtTokens& t_;
  const int64_t first_text_, tiles_of_text_, tiles_, inner_, columns_;
  Tiles shared_, hidden_, query_, key_, value_, gate_, up_, cosine_, sine_;
  Buffer packed_;
};

// As `Decoding::run`, for any number of tokens; some texts at a time, so that their activations take little memory.
template <int Width, typename P>
void run_prompt(const NtPlan& plan, const NtTokens& tokens, const float* stems, float* out) {
  constexpr int64_t together = 1024;  // tokens
  const int64_t texts = std::max<int64_t>(1, together / round_up(tokens.length, Width));
  for (int64_t first = 0; first < tokens.texts; first += texts)
    Prompt<Width, P>(plan, tokens, first, std::min(texts, tokens.texts - first)).run(stems, out);
}

}  // namespace
