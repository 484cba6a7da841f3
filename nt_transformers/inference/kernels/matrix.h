// Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
//
// What every product shares: the matrix, the types of its values, memory.
//
// A matrix stores one bit for each weight (set: the weight exists) and the values of the existing ones, row by row.
// Reading it costs 1/8 byte a weight plus the bytes of the values, so a weight that is not stored is hardly paid for.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#elif NT_NEON
#include <arm_neon.h>
#endif
#if defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VBMI__) && defined(__AVX512VBMI2__) && \
    defined(__AVX512VNNI__)
#define NT_AVX512 1
#if defined(__AVX512BF16__)
#define NT_BF16 1
#endif
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define NT_AVX2 1
#endif

extern "C" {

// A word of a bitmap, which a file may have put at any byte.
typedef uint32_t NtWord __attribute__((aligned(1), may_alias));

// Rows of a sparse matrix. `values` must be readable for 64 bytes beyond its end.
struct NtMatrix {
  int64_t rows, columns;
  const NtWord* bitmap;         // [rows, ceil(columns / 32)]; null: dense, all values are stored
  const void* values;           // of the existing weights, row by row
  const int64_t* starts;        // [rows + 1], where in `values` each row begins, and the last one ends
  const float* scales;          // [rows] for int8, else null
  const int64_t* sums;          // [rows], the sum of the values, for int8, else null
  const uint16_t* places;       // the column of each value and eight zeros, where products go by them; else null
  const uint8_t* slices;        // the weights as slices.h arranges them, where products go by them; else null
  const int64_t* slice_starts;  // where in them each block of rows begins
  int64_t slice_chunks;         // of a block of rows
  int32_t slice_bits;           // of a column in them: 8, or 4 for distances
  int32_t type;                 // see Type
};

}  // extern "C"

namespace {

constexpr int64_t kBits = 32;  // columns of one word of the bitmap

enum Type : int32_t { kBFloat16 = 0, kFloat16 = 1, kFloat32 = 2, kInt8 = 3 };

struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

// Calls `function` with a value of the C++ type that a matrix holds.
template <typename F> void with_type(int32_t type, F&& function) {
  switch (type) {
    case kBFloat16: return function(BFloat16{});
    case kFloat16: return function(Float16{});
    case kFloat32: return function(float{});
    case kInt8: return function(int8_t{});
  }
}

inline float to_float(float value) { return value; }
inline float to_float(int8_t value) { return static_cast<float>(value); }
inline float to_float(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}
inline float to_float(Float16 value) {
#if defined(__F16C__)
  return _cvtsh_ss(value.bits);
#elif NT_NEON
  return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(value.bits))), 0);
#else
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t exponent = (value.bits >> 10) & 0x1fu, mantissa = value.bits & 0x3ffu;
  float result;
  if (exponent == 0) {
    result = std::ldexp(static_cast<float>(mantissa), -24);
    return sign ? -result : result;
  }
  const uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | (mantissa << 13);
  std::memcpy(&result, &bits, sizeof result);
  return result;
#endif
}

inline BFloat16 to_bfloat16(float value) {  // to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (value != value) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline void store(float value, float* to) { *to = value; }
inline void store(float value, BFloat16* to) { *to = to_bfloat16(value); }
inline void copy(BFloat16 value, BFloat16* to) { *to = value; }
template <typename V> void copy(V value, float* to) { *to = to_float(value); }

// The float32s of one register: GCC keeps vectors of several in memory.
#if NT_AVX512
constexpr int kLanes = 16;
#elif NT_AVX2
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
template <typename T, int N> struct Vector {
  typedef T Type __attribute__((vector_size(N * sizeof(T)), may_alias));
};
using Lanes = Vector<float, kLanes>::Type;
inline Lanes load_lanes(const float* from) { return *reinterpret_cast<const Lanes*>(from); }
inline Lanes load_lanes(const BFloat16* from) {
  typedef uint16_t Halves __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));
  using Words = Vector<uint32_t, kLanes>::Type;
  return reinterpret_cast<Lanes>(__builtin_convertvector(*reinterpret_cast<const Halves*>(from), Words) << 16);
}
inline void store_lanes(Lanes lanes, float* to) { *reinterpret_cast<Lanes*>(to) = lanes; }

int64_t words_per_row(int64_t columns) { return (columns + kBits - 1) / kBits; }
int64_t round_up(int64_t size, int64_t step) { return (size + step - 1) / step * step; }

// Float32s of which registers straddle no cache line. Not cleared.
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : data_(static_cast<float*>(std::aligned_alloc(64, round_up(size * sizeof(float), 64)))) {}
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  float* data() { return data_; }
  const float* data() const { return data_; }

 private:
  float* data_;
};

}  // namespace
