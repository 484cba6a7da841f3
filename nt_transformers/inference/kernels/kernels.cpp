// Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
//
// Products with sparse matrices on CPUs. No torch headers: a plain C interface, compiled in seconds. The same source
// serves every processor; compile with the flags of its instruction set. Results are float32, whatever the type of the
// values.

#include <omp.h>

#include "decode.h"
#include "tokens.h"

extern "C" {

// The instruction set that this library was compiled for: 2 AVX-512 with VBMI2, 1 AVX2, 0 any.
int32_t nt_instruction_set() {
#if NT_AVX512
  return 2;
#elif NT_AVX2
  return 1;
#else
  return 0;
#endif
}

// y [tokens, rows] = x [tokens, columns] A^T, all float32.
void nt_multiply(const NtMatrix* a, const float* x, float* y, int64_t tokens, int32_t threads) {
  omp_set_num_threads(threads);
  with_type(a->type, [&](auto value) { multiply<decltype(value)>(*a, x, y, tokens); });
}

// dense [rows, columns], float32.
void nt_to_dense(const NtMatrix* a, float* dense, int32_t threads) {
  omp_set_num_threads(threads);
  with_type(a->type, [&](auto value) { to_dense<decltype(value)>(*a, dense); });
}

// The next token of one text through all layers: out [heads, hidden], after the final norms.
//
// stems [1 or heads, hidden]: the token's embedding, one for each head where there is no backbone; cosine, sine
// [head_size]; keys, values: for each layer, in the order of `layers`, [key_value_heads, capacity, head_size] in
// bfloat16 (`type` 0) or float32 (2), of which `position` entries are filled; this token's are added.
void nt_decode(const NtPlan* plan, const float* stems, void* const* keys, void* const* values, int32_t type,
               int64_t capacity, int64_t position, const float* cosine, const float* sine, float* out,
               int32_t threads) {
  omp_set_num_threads(threads);
  (type == kBFloat16 ? decode<BFloat16> : decode<float>)(*plan, stems, keys, values, capacity, position, cosine, sine,
                                                         out);
}

}  // extern "C"
