// Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
//
// Products with sparse matrices on CPUs. No torch headers: a plain C interface, compiled in seconds. The same source
// serves every processor; compile with the flags of its instruction set. Sums are float32, whatever the type of values
// and activations.

#include <omp.h>

#include "decode.h"
#include "tokens.h"

extern "C" {

// y [tokens, rows] = x [tokens, columns] A^T; x and y in float32 (`type` 2) or bfloat16 (0), the type of the activations.
void nt_multiply(const NtMatrix* a, const void* x, void* y, int32_t type, int64_t tokens, int32_t threads) {
  omp_set_num_threads(threads);
  if (type == kBFloat16)
    multiply(*a, static_cast<const BFloat16*>(x), static_cast<BFloat16*>(y), tokens);
  else
    multiply(*a, static_cast<const float*>(x), static_cast<float*>(y), tokens);
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

// A few tokens through all layers: stems [1 or heads, tokens, hidden], the tokens' embeddings, one for each head where
// there is no backbone, to out [heads, tokens, hidden], after the final norms. Keys and values are added to the cache.
void nt_decode(const NtPlan* plan, const NtTokens* tokens, const float* stems, float* out, int32_t threads) {
  omp_set_num_threads(threads);
  const auto run = [&](auto cache) {
    using C = decltype(cache);
    if (plan->rounds)
      Decoding<C, BFloat16>(*plan, *tokens).run(stems, out);
    else
      Decoding<C, float>(*plan, *tokens).run(stems, out);
  };
  tokens->type == kBFloat16 ? run(BFloat16{}) : run(float{});
}

}  // extern "C"
