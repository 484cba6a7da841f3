// Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
//
// Products with sparse matrices on CPUs. No torch headers: a plain C interface, compiled in seconds. The same source
// serves every processor; compile with the flags of its instruction set. Sums are float32, whatever the type of values
// and activations.

#include <omp.h>

#include "prompt.h"

extern "C" {

// y [tokens, rows] = x [tokens, columns] A^T; x and y in float32 (`type` 2) or bfloat16 (0), the type of the activations.
void nt_multiply(const NtMatrix* a, const void* x, void* y, int32_t type, int64_t tokens, int32_t threads) {
  omp_set_num_threads(threads);
  if (type == kBFloat16)
    multiply(*a, static_cast<const BFloat16*>(x), static_cast<BFloat16*>(y), tokens);
  else
    multiply(*a, static_cast<const float*>(x), static_cast<float*>(y), tokens);
}

// sums [rows] of the int8 values of each row, which begin at `starts` [rows + 1]. By one thread: read once, from memory.
void nt_sum_rows(const int8_t* values, const int64_t* starts, int64_t rows, int64_t* sums) {
  for (int64_t row = 0; row < rows; ++row) {
    int64_t sum = 0;
    for (int64_t i = starts[row]; i < starts[row + 1]; ++i) sum += values[i];
    sums[row] = sum;
  }
}

// The layout of slices.h, for `threads` threads: sets `slice_chunks` and `slice_bits`, writes where blocks of rows begin
// to `starts` [rows / 16 + 2]; returns the number of bytes in all.
int64_t nt_measure_slices(NtMatrix* a, int64_t* starts, int32_t threads) {
  omp_set_num_threads(threads);
  a->slice_chunks = chunks_of(a->rows, threads);
  // Below this density, distances of more than 15 columns take more memory than whole columns save.
  const bool dense = a->starts[a->rows] >= 0.1 * a->rows * a->columns;
  a->slice_bits = dense && a->type == kBFloat16 ? 4 : 8;
  const std::vector<int64_t> measured = measure_slices(*a);
  std::copy(measured.begin(), measured.end(), starts);
  return measured.back();
}

// Writes the slices to `out`, as `a->slice_starts`, `slice_chunks` and `slice_bits` were measured.
void nt_slice(const NtMatrix* a, uint8_t* out, int32_t threads) {
  omp_set_num_threads(threads);
  write_slices(*a, out);
}

// dense [rows, columns], in float32 (`type` 2) or bfloat16 (0), without scales.
void nt_to_dense(const NtMatrix* a, void* dense, int32_t type, int32_t threads) {
  omp_set_num_threads(threads);
  with_type(a->type, [&](auto value) {
    using V = decltype(value);
    if (type == kBFloat16)
      to_dense<V>(*a, static_cast<BFloat16*>(dense));
    else
      to_dense<V>(*a, static_cast<float*>(dense));
  });
}

// Tokens through all layers: stems [1 or heads, tokens, hidden], the tokens' embeddings, one for each head where there
// is no backbone, to out [heads, tokens, hidden], after the final norms. Keys and values are added to the cache, whose
// layers may be one and the same for tokens that begin a text.
void nt_decode(const NtPlan* plan, const NtTokens* tokens, const float* stems, float* out, int32_t threads) {
  omp_set_num_threads(threads);
  const auto few = [&](auto cache, auto activation) {
    Decoding<decltype(cache), decltype(activation)>(*plan, *tokens).run(stems, out);
  };
  const auto many = [&](auto packed) {
    using P = decltype(packed);
    tokens->length > 32 ? run_prompt<64, P>(*plan, *tokens, stems, out) : run_prompt<32, P>(*plan, *tokens, stems, out);
  };
  // Where tokens are few, heads run side by side: not if layers share their memory for keys and values.
  const bool shared = plan->backbone_depth + plan->heads * plan->head_depth > 1 && tokens->keys[0] == tokens->keys[1];
  if (tokens->texts * tokens->length <= kFewTokens && !shared) {
    if (plan->rounds)
      tokens->type == kBFloat16 ? few(BFloat16{}, BFloat16{}) : few(float{}, BFloat16{});
    else
      tokens->type == kBFloat16 ? few(BFloat16{}, float{}) : few(float{}, float{});
    return;
  }
#if NT_BF16
  const int32_t type = plan->layers->query.type;
  if (plan->rounds && (type == kBFloat16 || type == kInt8)) return many(BFloat16{});
#endif
  many(float{});
}

}  // extern "C"
