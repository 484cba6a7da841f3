// Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
//
// One token: y = A x.
//
// - AVX-512 (of Ice Lake, Zen 4 and later) spreads the values over their columns by a permutation that it computes
//   from the bits (vpexpand does so in one instruction, which takes Zen 4 five cycles and more between others);
// - AVX2 expands 8 columns by a permutation looked up by the 8 bits;
// - anything else walks over the set bits.

#pragma once

#include "matrix.h"

namespace {

constexpr int64_t kPrefetch = 4096;  // bytes ahead; shorter leaves bandwidth unused
constexpr int64_t kInputStep = 64;   // columns that inputs are padded to

// A vector x as the products read it: float32, or fixed-point digits where the values are multiplied as integers.
class Input {
 public:
  // Room for so many columns.
  explicit Input(int64_t columns) : data_(round_up(columns, kInputStep)) {}

  // Takes x [columns] for matrices of the given type of values.
  void set(int32_t type, const float* x, int64_t columns) {
    std::memcpy(data_.data(), x, sizeof(float) * columns);
    std::memset(data_.data() + columns, 0, sizeof(float) * (round_up(columns, kInputStep) - columns));
#if NT_AVX512
    if (type == kInt8) to_digits(columns);
#endif
  }
  const float* floats() const { return data_.data(); }

#if NT_AVX512
  const uint8_t* digits() const { return reinterpret_cast<const uint8_t*>(data_.data()); }
  float scale() const { return scale_; }
#endif

 private:
  Buffer data_;

#if NT_AVX512
  static constexpr float kLargest = 0x7ffff0;  // below 2^23 by what a product may be rounded up
  float scale_ = 0;

  // In place: three bytes for each column, of x / scale rounded to a whole number plus 2^23. Blocks of 64 columns hold
  // the 64 lowest bytes, the middle, the highest, each in the order 0, 8, .. 56, 1, 9, ..
  void to_digits(int64_t columns) {
    float largest = 0, not_finite = 0;
    for (int64_t i = 0; i < columns; i += kLanes) {
      const __m512 part = _mm512_load_ps(data_.data() + i);
      largest = std::max(largest, _mm512_reduce_max_ps(_mm512_abs_ps(part)));
      not_finite += _mm512_reduce_add_ps(_mm512_mul_ps(part, _mm512_setzero_ps()));
    }
    // What is not finite makes all products NaN.
    scale_ = largest / kLargest + not_finite;
    const __m512 inverse = _mm512_set1_ps(largest > 1e-30f ? kLargest / largest : 0);
    alignas(64) static const auto transposed = [] {
      struct { uint8_t order[64]; } table{};
      for (int i = 0; i < 64; ++i) table.order[i] = static_cast<uint8_t>(8 * (i % 8) + i / 8);
      return table;
    }();
    const __m512i order = _mm512_load_si512(transposed.order);
    uint8_t* out = reinterpret_cast<uint8_t*>(data_.data());
    for (int64_t block = 0; block < columns; block += 64) {
      __m512i numbers[4];
      for (int part = 0; part < 4; ++part) {
        const __m512 x = _mm512_load_ps(data_.data() + block + 16 * part);
        numbers[part] = _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(x, inverse)), _mm512_set1_epi32(1 << 23));
      }
      // Three bytes for four: what is written was read before.
      for (int digit = 0; digit < 3; ++digit, out += 64) {
        alignas(64) uint8_t bytes[64];
        for (int part = 0; part < 4; ++part) {
          const __m512i shifted = _mm512_srli_epi32(numbers[part], 8 * digit);
          _mm_store_si128(reinterpret_cast<__m128i*>(bytes + 16 * part), _mm512_cvtepi32_epi8(shifted));
        }
        _mm512_store_si512(out, _mm512_permutexvar_epi8(order, _mm512_load_si512(bytes)));
      }
    }
  }
#endif
};

// A `Dot<V>` adds up one row, as many columns at a time as there are in its `Bits`.

#if NT_AVX512

// Lane j of half h: how many weights exist before column 16 h + j, which is where the value of that column stands.
inline __m512i positions(uint32_t bits, int half) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i column = _mm512_add_epi32(lanes, _mm512_set1_epi32(16 * half));
  const __m512i below = _mm512_sub_epi32(_mm512_sllv_epi32(_mm512_set1_epi32(1), column), _mm512_set1_epi32(1));
  return _mm512_popcnt_epi32(_mm512_and_si512(_mm512_set1_epi32(static_cast<int>(bits)), below));
}

// The values of both halves of 32 columns as float32, anything where no weight exists.
inline void spread(uint32_t bits, const BFloat16* values, __m512* halves) {
  // Both halves at once: the lower 16 bits count in even lanes, the upper ones in odd lanes.
  const __m512i bit = _mm512_setr_epi32(0x10001, 0x20002, 0x40004, 0x80008, 0x100010, 0x200020, 0x400040, 0x800080,
                                        0x1000100, 0x2000200, 0x4000400, 0x8000800, 0x10001000, 0x20002000, 0x40004000,
                                        static_cast<int>(0x80008000));
  const __m512i below = _mm512_sub_epi16(bit, _mm512_set1_epi16(1));
  const __m512i places = _mm512_popcnt_epi16(_mm512_and_si512(_mm512_set1_epi32(static_cast<int>(bits)), below));
  const auto load = [](const BFloat16* from) {
    return _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  };
  // A bfloat16 is the upper half of a float32.
  constexpr __mmask32 upper = 0xaaaaaaaa;
  const __m512i first = _mm512_maskz_permutexvar_epi16(upper, _mm512_slli_epi32(places, 16), load(values));
  const __m512i second =
      _mm512_maskz_permutexvar_epi16(upper, places, load(values + __builtin_popcount(bits & 0xffff)));
  halves[0] = _mm512_castsi512_ps(first);
  halves[1] = _mm512_castsi512_ps(second);
}
inline void spread(uint32_t bits, const Float16* values, __m512* halves) {
  for (int half = 0; half < 2; ++half) {
    const __m512i spread = _mm512_permutexvar_epi16(positions(bits, half), _mm512_loadu_si512(values));
    halves[half] = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(spread));
  }
}
inline void spread(uint32_t bits, const float* values, __m512* halves) {
  halves[0] = _mm512_permutexvar_ps(positions(bits, 0), _mm512_loadu_ps(values));
  values += __builtin_popcount(bits & 0xffff);
  halves[1] = _mm512_permutexvar_ps(positions(bits >> 16, 0), _mm512_loadu_ps(values));
}

template <typename V> struct Dot {
  using Bits = uint32_t;
  __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  void add(Bits bits, const V* values, const Input& x, int64_t column) {
    __m512 halves[2];
    spread(bits, values, halves);
    for (int half = 0; half < 2; ++half) {
      const __mmask16 exists = static_cast<__mmask16>(bits >> 16 * half);
      const __m512 inputs = _mm512_load_ps(x.floats() + column + 16 * half);
      sums[half] = _mm512_mask3_fmadd_ps(halves[half], inputs, sums[half], exists);
    }
  }
  float total(const NtMatrix&, int64_t, const Input&) const {
    return _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1]));
  }
};

// Integer products with the three digits of x. No sum overflows below a million columns.
template <> struct Dot<int8_t> {
  using Bits = uint64_t;
  __m512i sums[3] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
  void add(Bits bits, const int8_t* values, const Input& x, int64_t column) {
    // Byte 8 j + b stands for column 8 b + j: broadcasting the bits puts each byte of them where it is needed.
    const __m512i bit = _mm512_setr_epi64(0x0101010101010101, 0x0202020202020202, 0x0404040404040404,
                                          0x0808080808080808, 0x1010101010101010, 0x2020202020202020,
                                          0x4040404040404040, static_cast<int64_t>(0x8080808080808080));
    const __m512i below = _mm512_sub_epi8(bit, _mm512_set1_epi8(1));
    // Byte b: how many weights exist in the b groups of 8 columns before.
    uint64_t counts = bits - (bits >> 1 & 0x5555555555555555);
    counts = (counts & 0x3333333333333333) + (counts >> 2 & 0x3333333333333333);
    counts = ((counts + (counts >> 4)) & 0x0f0f0f0f0f0f0f0f) * 0x0101010101010100;
    const __m512i all = _mm512_set1_epi64(static_cast<int64_t>(bits));
    const __m512i places = _mm512_add_epi8(_mm512_popcnt_epi8(_mm512_and_si512(all, below)),
                                           _mm512_set1_epi64(static_cast<int64_t>(counts)));
    const __m512i weights = _mm512_maskz_permutexvar_epi8(_mm512_test_epi8_mask(all, bit), places,
                                                          _mm512_loadu_si512(values));
    const uint8_t* digits = x.digits() + 3 * column;
    for (int i = 0; i < 3; ++i)
      sums[i] = _mm512_dpbusd_epi32(sums[i], _mm512_load_si512(digits + 64 * i), weights);
  }
  float total(const NtMatrix& a, int64_t row, const Input& x) const {
    int64_t sum = a.sums[row] * -(1 << 23);
    for (int i = 0; i < 3; ++i) sum += static_cast<int64_t>(_mm512_reduce_add_epi32(sums[i])) * (1 << 8 * i);
    return static_cast<float>(sum) * x.scale() * a.scales[row];
  }
};

#else

template <typename V> float scaled(float sum, const NtMatrix& a, int64_t row) {
  return std::is_same_v<V, int8_t> ? sum * a.scales[row] : sum;
}

#if NT_AVX2

// For each byte of the bitmap: which value each of the 8 columns takes, and which columns take one.
struct Expansion {
  alignas(32) int32_t source[256][8];
  alignas(32) int32_t present[256][8];
  Expansion() {
    for (int byte = 0; byte < 256; ++byte) {
      int next = 0;
      for (int column = 0; column < 8; ++column) {
        const bool set = byte >> column & 1;
        source[byte][column] = set ? next++ : 0;
        present[byte][column] = set ? -1 : 0;
      }
    }
  }
};
const Expansion kExpansion;

inline __m256 load8(const float* values) { return _mm256_loadu_ps(values); }
inline __m256 load8(const BFloat16* values) {
  const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(packed), 16));
}
inline __m256 load8(const Float16* values) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
}
inline __m256 load8(const int8_t* values) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(values))));
}

template <typename V> struct Dot {
  using Bits = uint32_t;
  __m256 sums[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
  void add(Bits bits, const V* values, const Input& x, int64_t column) {
    for (int part = 0; part < 4; ++part) {
      const uint32_t byte = bits >> (8 * part) & 0xff;
      const __m256i source = _mm256_load_si256(reinterpret_cast<const __m256i*>(kExpansion.source[byte]));
      const __m256 present = _mm256_load_ps(reinterpret_cast<const float*>(kExpansion.present[byte]));
      const __m256 expanded = _mm256_and_ps(_mm256_permutevar8x32_ps(load8(values), source), present);
      sums[part] = _mm256_fmadd_ps(expanded, _mm256_load_ps(x.floats() + column + 8 * part), sums[part]);
      values += __builtin_popcount(byte);
    }
  }
  float total(const NtMatrix& a, int64_t row, const Input&) const {
    const __m256 sum = _mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3]));
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, sum);
    return scaled<V>(((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7])),
                     a, row);
  }
};

#else

template <typename V> struct Dot {
  using Bits = uint32_t;
  float sum = 0;
  void add(Bits bits, const V* values, const Input& x, int64_t column) {
    for (; bits; bits &= bits - 1) sum += to_float(*values++) * x.floats()[column + __builtin_ctz(bits)];
  }
  float total(const NtMatrix& a, int64_t row, const Input&) const { return scaled<V>(sum, a, row); }
};

#endif
#endif

// y[0..Rows) = the products of as many rows with x; several rows at a time share the loads of x.
template <typename V, int Rows> void dot_rows(const NtMatrix& a, int64_t row, const Input& x, float* y) {
  using Bits = typename Dot<V>::Bits;
  constexpr int64_t width = 8 * sizeof(Bits);
  const int64_t words = words_per_row(a.columns);
  const V* values[Rows];
  Dot<V> dots[Rows];
  for (int r = 0; r < Rows; ++r) values[r] = static_cast<const V*>(a.values) + a.starts[row + r];
  const auto add = [&](int r, Bits bits, int64_t column) {
    __builtin_prefetch(reinterpret_cast<const char*>(values[r]) + kPrefetch);
    dots[r].add(bits, values[r], x, column);
    values[r] += __builtin_popcountll(bits);
  };
  int64_t column = 0;
  if (a.bitmap == nullptr) {
    for (; column + width <= a.columns; column += width)
      for (int r = 0; r < Rows; ++r) add(r, ~Bits{0}, column);
    if (column < a.columns)
      for (int r = 0; r < Rows; ++r) add(r, (Bits{1} << (a.columns - column)) - 1, column);
  } else {
    const uint32_t* bitmap = a.bitmap + row * words;
    for (; column + width <= words * kBits; column += width)
      for (int r = 0; r < Rows; ++r) {
        Bits bits;
        std::memcpy(&bits, bitmap + r * words + column / kBits, sizeof bits);
        add(r, bits, column);
      }
    if (column < words * kBits)
      for (int r = 0; r < Rows; ++r) add(r, bitmap[r * words + words - 1], column);
  }
  for (int r = 0; r < Rows; ++r) y[r] = dots[r].total(a, row + r, x);
}

// Calls `take(row, value)` with each product of a row and `x`, in a team of threads; returns without waiting for them.
template <typename Take> void each_row(const NtMatrix& a, const Input& x, Take&& take) {
  with_type(a.type, [&](auto type) {
    using V = decltype(type);
    constexpr int64_t step = 4;
#pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < a.rows; row += step) {
      float y[step];
      const int64_t taken = std::min(step, a.rows - row);
      if (taken == step) {
        dot_rows<V, step>(a, row, x, y);
      } else {
        for (int64_t r = 0; r < taken; ++r) dot_rows<V, 1>(a, row + r, x, y + r);
      }
      for (int64_t r = 0; r < taken; ++r) take(row + r, y[r]);
    }
  });
}

void multiply_vector(const NtMatrix& a, const float* x, float* y) {
  Input input(a.columns);
  input.set(a.type, x, a.columns);
#pragma omp parallel
  each_row(a, input, [&](int64_t row, float value) { y[row] = value; });
}

}  // namespace
