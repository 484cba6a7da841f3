// Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
//
// Few tokens: y = A x, as dot products of the rows of A with each token.
//
// - AVX-512 (of Ice Lake, Zen 4 and later) expands 32 or 64 columns at once by the bits themselves;
// - AVX2 and NEON expand 8 columns (NEON 4 of float32) by a shuffle looked up by their bits;
// - anything else walks over the set bits;
// - where few weights exist, their columns are listed, and x is picked by them.
//
// Activations are float32, or come from a model that rounds them to bfloat16: then bfloat16 values are multiplied by
// the processor's bfloat16 products if it has them, and int8 values with 16 bits of an activation in place of 24.

#pragma once

#include <vector>

#include "slices.h"

namespace {

template <int N> using Constant = std::integral_constant<int, N>;

// Bytes ahead; shorter leaves bandwidth unused. Bitmaps are read more slowly than values.
constexpr int64_t kPrefetch = 6144, kPrefetchBitmap = 2048;
constexpr int64_t kInputStep = 64;   // columns that inputs are padded to

// Bytes of an activation that int8 values are multiplied with.
template <typename X> constexpr int kDigits = std::is_same_v<X, BFloat16> ? 2 : 3;

// Some of the tokens of an `Input`.
struct Tokens {
  const float* data;
  int64_t stride;
  const float* scales;

  const float* floats(int64_t token) const { return data + token * stride; }
  const uint16_t* rounded(int64_t token) const { return reinterpret_cast<const uint16_t*>(floats(token)); }
  const uint8_t* bytes(int64_t token) const { return reinterpret_cast<const uint8_t*>(floats(token)); }
  float scale(int64_t token) const { return scales[token]; }
};

// Whether products go by listed columns: several tokens would share the expansion of the values.
inline bool by_places(const NtMatrix& a, int64_t tokens) { return a.places != nullptr && tokens == 1; }

// Vectors x of a few tokens as the products read them: float32, bfloat16, or fixed-point digits where the values are
// multiplied as integers.
class Input {
 public:
  // Room for so many columns of so many tokens.
  Input(int64_t columns, int64_t tokens)
      : stride_(std::max(round_up(columns, kInputStep), plane_bytes(columns) / int64_t{sizeof(float)})),
        data_(tokens * stride_), scales_(tokens) {}

  // Takes a token's x, of activations of type X, for products of `tokens` tokens with matrices like `a`.
  template <typename X, typename From> void set(const NtMatrix& a, int64_t tokens, int64_t token, const From* x) {
    const int64_t columns = a.columns;
    float* to = data_.data() + token * stride_;
    if (by_slices<X>(a, tokens))
      return to_planes(x, columns, a.type == kInt8 ? kUnit<int8_t> : 1, reinterpret_cast<uint8_t*>(to));
    const int64_t padded = round_up(columns, kInputStep);
    for (int64_t i = 0; i < columns; ++i) to[i] = to_float(x[i]);
    std::memset(to + columns, 0, sizeof(float) * (padded - columns));
    if (by_places(a, tokens)) return;
#if NT_AVX512
    if (a.type == kInt8) scales_[token] = to_digits<kDigits<X>>(to, padded);
#endif
#if NT_BF16
    if (a.type == kBFloat16 && std::is_same_v<X, BFloat16>) round(to, padded);
#endif
#if NT_AVX2
    if (a.type == kBFloat16 || a.type == kInt8) take_apart(to, padded);
#endif
  }
  Tokens from(int64_t token) const { return {data_.data() + token * stride_, stride_, scales_.data() + token}; }

 private:
  int64_t stride_;
  Buffer data_;
  std::vector<float> scales_;

#if NT_AVX512
  // In place: `Digits` bytes for each column, of x / scale rounded to a whole number plus half their range. Blocks of 64
  // columns hold the 64 lowest bytes, then the next. Returns the scale.
  template <int Digits> static float to_digits(float* x, int64_t columns) {
    constexpr int middle = 1 << (8 * Digits - 1);
    constexpr float most = middle * (1 - 0x1p-15f);  // less than `middle` by what a product may be rounded up
    __m512 largest = _mm512_setzero_ps(), not_finite = _mm512_setzero_ps();
    for (int64_t i = 0; i < columns; i += kLanes) {
      const __m512 part = _mm512_load_ps(x + i);
      largest = _mm512_max_ps(largest, _mm512_abs_ps(part));
      not_finite = _mm512_fmadd_ps(part, _mm512_setzero_ps(), not_finite);
    }
    const float end = _mm512_reduce_max_ps(largest);
    const __m512 inverse = _mm512_set1_ps(end > 1e-30f ? most / end : 0);
    uint8_t* out = reinterpret_cast<uint8_t*>(x);
    for (int64_t block = 0; block < columns; block += 64) {
      __m512i numbers[4];
      for (int part = 0; part < 4; ++part) {
        const __m512 scaled = _mm512_mul_ps(_mm512_load_ps(x + block + 16 * part), inverse);
        numbers[part] = _mm512_add_epi32(_mm512_cvtps_epi32(scaled), _mm512_set1_epi32(middle));
      }
      // Fewer bytes than they were: what is written was read before.
      for (int digit = 0; digit < Digits; ++digit, out += 64)
        for (int part = 0; part < 4; ++part) {
          const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_srli_epi32(numbers[part], 8 * digit));
          _mm_store_si128(reinterpret_cast<__m128i*>(out + 16 * part), bytes);
        }
    }
    // What is not finite makes all products NaN.
    return end / most + _mm512_reduce_add_ps(not_finite);
  }
#endif

#if NT_AVX2
  // In place: of sixteen columns each the even ones, then the odd ones.
  static void take_apart(float* x, int64_t columns) {
    for (int64_t i = 0; i < columns; i += 16) {
      const __m256 lower = _mm256_load_ps(x + i), upper = _mm256_load_ps(x + i + 8);
      for (int odd = 0; odd < 2; ++odd) {
        const __m256 mixed = odd ? _mm256_shuffle_ps(lower, upper, 0xdd) : _mm256_shuffle_ps(lower, upper, 0x88);
        const __m256d sorted = _mm256_permute4x64_pd(_mm256_castps_pd(mixed), 0xd8);
        _mm256_store_ps(x + i + 8 * odd, _mm256_castpd_ps(sorted));
      }
    }
  }
#endif

#if NT_BF16
  // In place.
  static void round(float* x, int64_t columns) {
    uint16_t* out = reinterpret_cast<uint16_t*>(x);
    for (int64_t i = 0; i < columns; i += 32) {
      const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_load_ps(x + i + 16), _mm512_load_ps(x + i));
      _mm512_store_si512(out + i, reinterpret_cast<__m512i>(both));
    }
  }
#endif
};

// A `Dot<V, X, T>` adds up one row for T tokens, as many columns at a time as there are in its `Bits`.

#if NT_AVX512

// The values of 32 or 64 columns, 0 where no weight exists. Zen's instructions wait for their destination, also where
// they only clear it; here that is a zero that nothing has to be waited for, which makes them three times as quick.
inline __m512i expand(uint32_t bits, const uint16_t* values) {
  __m512i spread = _mm512_setzero_si512();
  asm("vpexpandw %2, %0 %{%1%}" : "+v"(spread) : "Yk"(static_cast<__mmask32>(bits)), "m"(*reinterpret_cast<const __m512i_u*>(values)));
  return spread;
}
inline __m512i expand(uint64_t bits, const int8_t* values) {
  __m512i spread = _mm512_setzero_si512();
  asm("vpexpandb %2, %0 %{%1%}" : "+v"(spread) : "Yk"(static_cast<__mmask64>(bits)), "m"(*reinterpret_cast<const __m512i_u*>(values)));
  return spread;
}

// The same of 32 columns as float32.
inline void spread(uint32_t bits, const BFloat16* values, __m512* halves) {
  const __m512i all = expand(bits, &values->bits);
  for (int half = 0; half < 2; ++half) {
    const __m256i part = half ? _mm512_extracti64x4_epi64(all, 1) : _mm512_castsi512_si256(all);
    halves[half] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(part), 16));
  }
}
inline void spread(uint32_t bits, const Float16* values, __m512* halves) {
  const __m512i all = expand(bits, &values->bits);
  halves[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(all));
  halves[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(all, 1));
}
inline void spread(uint32_t bits, const float* values, __m512* halves) {
  for (int half = 0; half < 2; ++half) {
    const __mmask16 exists = static_cast<__mmask16>(bits >> 16 * half);
    halves[half] = _mm512_maskz_expand_ps(exists, _mm512_loadu_ps(values));
    values += __builtin_popcount(exists);
  }
}

template <typename V, typename X, int T> struct Dot {
  using Bits = uint32_t;
  static constexpr int chains = T <= 2 ? 2 : 1;  // enough independent sums to hide the latency of an addition
  static constexpr int registers = T * chains;
  __m512 sums[T][chains] = {};
  void add(Bits bits, const V* values, const Tokens& x, int64_t column) {
    __m512 halves[2];
    spread(bits, values, halves);
    for (int half = 0; half < 2; ++half) {
      const __mmask16 exists = static_cast<__mmask16>(bits >> 16 * half);
      for (int t = 0; t < T; ++t) {
        __m512& sum = sums[t][half % chains];
        sum = _mm512_mask3_fmadd_ps(halves[half], _mm512_load_ps(x.floats(t) + column + 16 * half), sum, exists);
      }
    }
  }
  float total(int t, const NtMatrix&, int64_t, const Tokens&) const {
    return _mm512_reduce_add_ps(chains == 2 ? _mm512_add_ps(sums[t][0], sums[t][1]) : sums[t][0]);
  }
};

#if NT_BF16

template <int T> struct Dot<BFloat16, BFloat16, T> {
  using Bits = uint32_t;
  static constexpr int registers = T;
  __m512 sums[T] = {};
  void add(Bits bits, const BFloat16* values, const Tokens& x, int64_t column) {
    const __m512bh weights = reinterpret_cast<__m512bh>(expand(bits, &values->bits));
    for (int t = 0; t < T; ++t)
      sums[t] = _mm512_dpbf16_ps(sums[t], weights,
                                 reinterpret_cast<__m512bh>(_mm512_load_si512(x.rounded(t) + column)));
  }
  float total(int t, const NtMatrix&, int64_t, const Tokens&) const { return _mm512_reduce_add_ps(sums[t]); }
};

#endif

// Integer products with the digits of x. No sum overflows below a million columns.
template <typename X, int T> struct Dot<int8_t, X, T> {
  using Bits = uint64_t;
  static constexpr int digits = kDigits<X>, registers = T * digits;
  __m512i sums[T][digits] = {};
  void add(Bits bits, const int8_t* values, const Tokens& x, int64_t column) {
    const __m512i weights = expand(bits, values);
    for (int t = 0; t < T; ++t)
      for (int i = 0; i < digits; ++i) {
        const __m512i numbers = _mm512_load_si512(x.bytes(t) + digits * column + 64 * i);
        sums[t][i] = _mm512_dpbusd_epi32(sums[t][i], numbers, weights);
      }
  }
  float total(int t, const NtMatrix& a, int64_t row, const Tokens& x) const {
    int64_t sum = -a.sums[row] * (1 << (8 * digits - 1));
    for (int i = 0; i < digits; ++i) sum += static_cast<int64_t>(_mm512_reduce_add_epi32(sums[t][i])) * (1 << 8 * i);
    return static_cast<float>(sum) * x.scale(t) * a.scales[row];
  }
};

#else

template <typename V> float scaled(float sum, const NtMatrix& a, int64_t row) {
  return std::is_same_v<V, int8_t> ? sum * a.scales[row] : sum;
}

#if NT_AVX2 || NT_NEON

// For each value of `Columns` bits: which bytes of the values, of `Size` bytes each, these columns take.
template <int Columns, int Size> struct Shuffles {
  alignas(32) int8_t bytes[1 << Columns][Columns * Size];
  Shuffles() {
    for (int bits = 0; bits < 1 << Columns; ++bits)
      for (int column = 0, next = 0; column < Columns; ++column)
        for (int byte = 0; byte < Size; ++byte)
          bytes[bits][column * Size + byte] = static_cast<int8_t>(bits >> column & 1 ? next++ : -1);  // -1: a zero
  }
};
const Shuffles<8, 1> kByteShuffles;
const Shuffles<8, 2> kHalfShuffles;

#endif

#if NT_AVX2

inline __m128i load16(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }
inline __m128i load8(const void* from) { return _mm_loadl_epi64(static_cast<const __m128i*>(from)); }
inline __m256i join(__m128i lower, __m128i upper) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(lower), upper, 1);
}

// The values of 16 columns, 0 where no weight exists, as 16 bits each.
template <typename V> __m256i expand(uint32_t bits, const V* values) {
  static_assert(sizeof(V) == 2);
  const uint32_t lower = bits & 0xff, upper = bits >> 8 & 0xff;
  const __m256i shuffle = join(load16(kHalfShuffles.bytes[lower]), load16(kHalfShuffles.bytes[upper]));
  return _mm256_shuffle_epi8(join(load16(values), load16(values + __builtin_popcount(lower))), shuffle);
}
inline __m256i expand(uint32_t bits, const int8_t* values) {
  const uint32_t lower = bits & 0xff, upper = bits >> 8 & 0xff;
  const auto eight = [](uint32_t byte, const int8_t* from) {
    return _mm_shuffle_epi8(load8(from), load8(kByteShuffles.bytes[byte]));
  };
  return _mm256_cvtepi8_epi16(_mm_unpacklo_epi64(eight(lower, values), eight(upper, values + __builtin_popcount(lower))));
}

// The same as float32: of bfloat16 and int8 the even columns, then the odd ones, which is less work than in order.
inline void spread(__m256i values, BFloat16, __m256* halves) {
  halves[0] = _mm256_castsi256_ps(_mm256_slli_epi32(values, 16));
  halves[1] = _mm256_castsi256_ps(_mm256_blend_epi16(values, _mm256_setzero_si256(), 0x55));
}
inline void spread(__m256i values, int8_t, __m256* halves) {
  halves[0] = _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(values, 16), 16));
  halves[1] = _mm256_cvtepi32_ps(_mm256_srai_epi32(values, 16));
}
inline void spread(__m256i values, Float16, __m256* halves) {
  halves[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(values));
  halves[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(values, 1));
}
template <typename V> void spread(uint32_t bits, const V* values, __m256* halves) {
  spread(expand(bits, values), V{}, halves);
}
inline void spread(uint32_t bits, const float* values, __m256* halves) {
  for (int half = 0; half < 2; ++half) {
    const uint32_t byte = bits >> 8 * half & 0xff;
    const __m256i source = _mm256_cvtepi8_epi32(load8(kByteShuffles.bytes[byte]));
    const __m256 chosen = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values), source);
    halves[half] = _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(source, 31)), chosen);
    values += __builtin_popcount(byte);
  }
}

template <typename V, typename X, int T> struct Dot {
  using Bits = uint32_t;
  static constexpr int registers = 2 * T;
  __m256 sums[T][2] = {};
  void add(Bits bits, const V* values, const Tokens& x, int64_t column) {
    for (int part = 0; part < 2; ++part) {
      __m256 halves[2];
      spread(bits >> 16 * part, values, halves);
      for (int t = 0; t < T; ++t)
        for (int half = 0; half < 2; ++half) {
          const __m256 numbers = _mm256_load_ps(x.floats(t) + column + 16 * part + 8 * half);
          sums[t][half] = _mm256_fmadd_ps(halves[half], numbers, sums[t][half]);
        }
      values += __builtin_popcount(bits & 0xffff);
    }
  }
  float total(int t, const NtMatrix& a, int64_t row, const Tokens&) const {
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, _mm256_add_ps(sums[t][0], sums[t][1]));
    const float sum = ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
    return scaled<V>(sum, a, row);
  }
};

#elif NT_NEON

const Shuffles<4, 4> kWordShuffles;

template <int Columns, int Size> uint8x16_t shuffle(const Shuffles<Columns, Size>& table, uint32_t bits) {
  return vreinterpretq_u8_s8(vld1q_s8(table.bytes[bits]));
}
inline uint8x16_t load16(const void* from) { return vld1q_u8(static_cast<const uint8_t*>(from)); }

// The values of 8 columns as float32, 0 where no weight exists: an index beyond the table takes a zero.
template <typename V> uint16x8_t expand(uint32_t bits, const V* values) {
  static_assert(sizeof(V) == 2);
  return vreinterpretq_u16_u8(vqtbl1q_u8(load16(values), shuffle(kHalfShuffles, bits)));
}
inline void spread(uint32_t bits, const BFloat16* values, float32x4_t* halves) {
  const uint16x8_t all = expand(bits, values);
  halves[0] = vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(all), 16));
  halves[1] = vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(all), 16));
}
inline void spread(uint32_t bits, const Float16* values, float32x4_t* halves) {
  const float16x8_t all = vreinterpretq_f16_u16(expand(bits, values));
  halves[0] = vcvt_f32_f16(vget_low_f16(all));
  halves[1] = vcvt_f32_f16(vget_high_f16(all));
}
inline void spread(uint32_t bits, const int8_t* values, float32x4_t* halves) {
  const int8x8_t all = vqtbl1_s8(vreinterpretq_s8_u8(load16(values)), vld1_u8(reinterpret_cast<const uint8_t*>(kByteShuffles.bytes[bits])));
  const int16x8_t wider = vmovl_s8(all);
  halves[0] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(wider)));
  halves[1] = vcvtq_f32_s32(vmovl_s16(vget_high_s16(wider)));
}
inline void spread(uint32_t bits, const float* values, float32x4_t* halves) {
  for (int half = 0; half < 2; ++half) {
    const uint32_t four = bits >> 4 * half & 0xf;
    halves[half] = vreinterpretq_f32_u8(vqtbl1q_u8(load16(values), shuffle(kWordShuffles, four)));
    values += __builtin_popcount(four);
  }
}

template <typename V, typename X, int T> struct Dot {
  using Bits = uint32_t;
  static constexpr int registers = 2 * T;
  float32x4_t sums[T][2] = {};
  void add(Bits bits, const V* values, const Tokens& x, int64_t column) {
    for (int part = 0; part < 4; ++part) {
      const uint32_t byte = bits >> 8 * part & 0xff;
      float32x4_t halves[2];
      spread(byte, values, halves);
      for (int t = 0; t < T; ++t)
        for (int half = 0; half < 2; ++half) {
          const float32x4_t numbers = vld1q_f32(x.floats(t) + column + 8 * part + 4 * half);
          sums[t][half] = vfmaq_f32(sums[t][half], halves[half], numbers);
        }
      values += __builtin_popcount(byte);
    }
  }
  float total(int t, const NtMatrix& a, int64_t row, const Tokens&) const {
    return scaled<V>(vaddvq_f32(vaddq_f32(sums[t][0], sums[t][1])), a, row);
  }
};

#else

template <typename V, typename X, int T> struct Dot {
  using Bits = uint32_t;
  static constexpr int registers = T;
  float sums[T] = {};
  void add(Bits bits, const V* values, const Tokens& x, int64_t column) {
    for (; bits; bits &= bits - 1) {
      const float value = to_float(*values++);
      for (int t = 0; t < T; ++t) sums[t] += value * x.floats(t)[column + __builtin_ctz(bits)];
    }
  }
  float total(int t, const NtMatrix& a, int64_t row, const Tokens&) const { return scaled<V>(sums[t], a, row); }
};

#endif
#endif

// Fetches memory that will be read `ahead` bytes further on, `step` bytes with each call.
class Prefetch {
 public:
  Prefetch(const void* from, int64_t ahead, int64_t step)
      : next_(static_cast<const char*>(from) + ahead), step_(step) {}
  void operator()() {
    for (int64_t line = 0; line < step_; line += 64) __builtin_prefetch(next_ + line);
    next_ += step_;
  }

 private:
  const char* next_;
  int64_t step_;
};

// y [Rows, stride] = the products of as many rows with T tokens; several rows at a time share the loads of x. Loops
// over rows are unrolled because GCC would write the sums to memory in every step.
template <typename V, typename X, int Rows, int T>
void dot_rows(const NtMatrix& a, int64_t row, const Tokens& x, float* y, int64_t stride) {
  using Sum = Dot<V, X, T>;
  using Bits = typename Sum::Bits;
  constexpr int64_t width = 8 * sizeof(Bits);
  const int64_t words = words_per_row(a.columns);
  const V* values[Rows];
  Sum dots[Rows];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) values[r] = static_cast<const V*>(a.values) + a.starts[row + r];
  // All rows at once, which lie one behind the other: each by itself would fetch what another one is reading.
  const int64_t bytes = (a.starts[row + Rows] - a.starts[row]) * sizeof(V);
  const int64_t steps = std::max<int64_t>(1, words * kBits / width);
  Prefetch fetch_values(values[0], std::max(kPrefetch, bytes), bytes / steps);
  const auto add = [&](int r, Bits bits, int64_t column) {
    dots[r].add(bits, values[r], x, column);
    values[r] += __builtin_popcountll(bits);
  };
  int64_t column = 0;
  if (a.bitmap == nullptr) {
    for (; column + width <= a.columns; column += width) {
      fetch_values();
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) add(r, ~Bits{0}, column);
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
      if (column < a.columns) add(r, (Bits{1} << (a.columns - column)) - 1, column);
  } else {
    const NtWord* bitmap = a.bitmap + row * words;
    Prefetch fetch_bitmap(bitmap, kPrefetchBitmap, Rows * sizeof(Bits));
    for (; column + width <= words * kBits; column += width) {
      fetch_values();
      fetch_bitmap();
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        Bits bits;
        std::memcpy(&bits, bitmap + r * words + column / kBits, sizeof bits);
        add(r, bits, column);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
      if (column < words * kBits) add(r, bitmap[r * words + words - 1], column);
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
    for (int t = 0; t < T; ++t) y[r * stride + t] = dots[r].total(t, a, row + r, x);
}

typedef float Eight __attribute__((vector_size(32), aligned(4), may_alias));

template <typename V> Eight load_eight(const V* from) {
  Eight eight;
  for (int i = 0; i < 8; ++i) eight[i] = to_float(from[i]);
  return eight;
}
inline Eight load_eight(const float* from) { return *reinterpret_cast<const Eight*>(from); }
inline Eight load_eight(const BFloat16* from) {
  typedef uint16_t Halves __attribute__((vector_size(16), aligned(2), may_alias));
  typedef uint32_t Words __attribute__((vector_size(32)));
  return reinterpret_cast<Eight>(__builtin_convertvector(*reinterpret_cast<const Halves*>(from), Words) << 16);
}
inline Eight load_eight(const int8_t* from) {
  typedef int8_t Bytes __attribute__((vector_size(8), aligned(1), may_alias));
  typedef int32_t Ints __attribute__((vector_size(32)));
  return __builtin_convertvector(__builtin_convertvector(*reinterpret_cast<const Bytes*>(from), Ints), Eight);
}

// The product of row `row` with x, by the columns of its values: on Zen quicker than the gather instruction.
template <typename V> float dot_places(const NtMatrix& a, int64_t row, const float* x) {
  typedef int32_t Ints __attribute__((vector_size(32)));
  const V* values = static_cast<const V*>(a.values) + a.starts[row];
  const uint16_t* places = a.places + a.starts[row];
  const int64_t count = a.starts[row + 1] - a.starts[row];
  const auto products = [&](int64_t at) {
    // Loads set the pace: four columns by one of them.
    uint64_t p[2];
    std::memcpy(p, places + at, sizeof p);
    const auto pick = [&](int lane) { return x[p[lane / 4] >> lane % 4 * 16 & 0xffff]; };
    return load_eight(values + at) * Eight{pick(0), pick(1), pick(2), pick(3), pick(4), pick(5), pick(6), pick(7)};
  };
  Eight sums = {};
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    __builtin_prefetch(reinterpret_cast<const char*>(values + i) + kPrefetch);
    __builtin_prefetch(reinterpret_cast<const char*>(places + i) + kPrefetch);
    for (int part = 0; part < 4; ++part) sums += products(i + 8 * part);
  }
  for (; i + 8 <= count; i += 8) sums += products(i);
  if (const int left = static_cast<int>(count - i)) sums += Ints{0, 1, 2, 3, 4, 5, 6, 7} < left ? products(i) : Eight{};
  const float sum = (sums[0] + sums[4]) + (sums[1] + sums[5]) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
  return a.scales ? sum * a.scales[row] : sum;
}

// For sums, of all rows that are multiplied together.
#if NT_AVX2
constexpr int kRegisters = 8;
#else
constexpr int kRegisters = 16;
#endif
constexpr int64_t kFewTokens = 16;  // of which these kernels are quicker than those for tiles of tokens

// As `each_row`, by slices.
template <typename V, int Bits, typename Take>
void each_sliced_row(const NtMatrix& a, const Tokens& x, int64_t tokens, Take&& take) {
  const int64_t step = a.slice_chunks * kChunk;
  // Threads take blocks as they get to them: their number is small, and seldom a multiple of that of the threads.
#pragma omp for schedule(dynamic) nowait
  for (int64_t first = 0; first < a.rows; first += step) {
    const int64_t rows = std::min(step, a.rows - first), chunks = (rows + kChunk - 1) / kChunk;
    float sums[kSlicedTokens][kBlockRows] = {};
    const uint8_t* block = a.slices + a.slice_starts[first / step];
    for (int64_t column = 0; column < a.columns; column += kTable) {
      const uint8_t* const from = block;
      for (int64_t t = 0; t < tokens; ++t) block = add_block<V, Bits>(from, chunks, x.bytes(t) + 2 * column, sums[t]);
    }
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t t = 0; t < tokens; ++t) {
        const float sum = sums[t][row];
        take(first + row, t, a.scales ? sum * a.scales[first + row] : sum);
      }
  }
}

// Calls `take(row, token, value)` with each product of a row and a token of `x`, in a team of threads; returns without
// waiting for them. X: type of the activations.
template <typename X, typename Take>
void each_row(const NtMatrix& a, const Input& x, int64_t first_token, int64_t tokens, Take&& take) {
  if (by_slices<X>(a, tokens))
    return with_slices(a, [&](auto value, auto bits) {
      each_sliced_row<decltype(value), bits>(a, x.from(first_token), tokens, take);
    });
  with_type(a.type, [&](auto type) {
    using V = decltype(type);
    if (by_places(a, tokens)) {
#pragma omp for schedule(static) nowait
      for (int64_t row = 0; row < a.rows; ++row) take(row, 0, dot_places<V>(a, row, x.from(first_token).floats(0)));
      return;
    }
    constexpr int64_t step = 8;
#pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < a.rows; row += step) {
      float y[step * kFewTokens];
      const int64_t rows = std::min(step, a.rows - row);
      const auto dots = [&](auto r, auto t, int64_t offset, int64_t token) {
        dot_rows<V, X, r, t>(a, row + offset, x.from(first_token + token), y + offset * kFewTokens + token, kFewTokens);
      };
      const auto some = [&](auto t, int64_t token) {
        constexpr int registers = Dot<V, X, t>::registers;
        int64_t offset = 0;
        const auto together = [&](auto r) {
          if constexpr (r == 1 || r * registers <= kRegisters)
            for (; offset + r <= rows; offset += r) dots(r, t, offset, token);
        };
        if (a.bitmap) together(Constant<8>{});  // dense rows are read more quickly from fewer places
        together(Constant<4>{});
        together(Constant<2>{});
        together(Constant<1>{});
      };
      int64_t token = 0;
      if constexpr (2 * Dot<V, X, 8>::registers <= kRegisters)
        for (; token + 8 <= tokens; token += 8) some(Constant<8>{}, token);
      for (; token + 4 <= tokens; token += 4) some(Constant<4>{}, token);
      if ((tokens - token) & 2) some(Constant<2>{}, token), token += 2;
      if ((tokens - token) & 1) some(Constant<1>{}, token);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t t = 0; t < tokens; ++t) take(row + r, t, y[r * kFewTokens + t]);
    }
  });
}

// Y [tokens, rows] = X [tokens, columns] A^T for up to `kFewTokens` tokens.
template <typename X> void multiply_few(const NtMatrix& a, const X* x, X* y, int64_t tokens) {
  Input input(a.columns, tokens);
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (int64_t token = 0; token < tokens; ++token) input.set<X>(a, tokens, token, x + token * a.columns);
    each_row<X>(a, input, 0, tokens,
                [&](int64_t row, int64_t token, float value) { store(value, y + token * a.rows + row); });
  }
}

}  // namespace
