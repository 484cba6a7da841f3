// Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
//
// Products with sparse matrices on CPUs. No torch headers: a plain C interface, compiled in seconds.
//
// A matrix stores one bit for each weight (set: the weight exists) and the values of the existing ones, row by row.
// Reading it costs 1/8 byte a weight plus the bytes of the values, so a weight that is not stored is hardly paid for.
//
// The same source serves every processor; compile with the flags of its instruction set:
// - AVX-512 (of Ice Lake, Zen 4 and later) spreads 16 columns by a permutation that it computes from the bits;
// - AVX2 expands 8 columns by a permutation looked up by the 8 bits;
// - anything else walks over the set bits.
// Arithmetic is float32, whatever the type of the values.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include <omp.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__AVX512VBMI2__) && defined(__AVX512VBMI__) && defined(__AVX512VPOPCNTDQ__) && defined(__AVX512BW__)
#define NT_AVX512 1
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define NT_AVX2 1
#endif

namespace {

constexpr int64_t kBits = 32;       // columns of one word of the bitmap
constexpr int64_t kPrefetch = 4096;  // bytes ahead; shorter leaves bandwidth unused

enum Type : int32_t { kBFloat16 = 0, kFloat16 = 1, kFloat32 = 2, kInt8 = 3 };

struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

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

// Registers straddle no cache line in it. Not cleared.
class Buffer {
 public:
  explicit Buffer(int64_t size) : data_(static_cast<float*>(std::aligned_alloc(64, (size * sizeof(float) + 63) & ~63))) {}
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  float* data() { return data_; }

 private:
  float* data_;
};

int64_t words_per_row(int64_t columns) { return (columns + kBits - 1) / kBits; }

// ---- One token: y = A x -------------------------------------------------------------------------------------------
// A `Dot<V>` adds up one row, 32 columns at a time.

#if NT_AVX512

// Lane j of half h: how many weights exist before column 16 h + j, which is where the value of that column stands.
// (vpexpand does the same in one instruction, at twice the time on processors that split it.)
inline __m512i positions(uint32_t bits, int half) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i column = _mm512_add_epi32(lanes, _mm512_set1_epi32(16 * half));
  const __m512i below = _mm512_sub_epi32(_mm512_sllv_epi32(_mm512_set1_epi32(1), column), _mm512_set1_epi32(1));
  return _mm512_popcnt_epi32(_mm512_and_si512(_mm512_set1_epi32(static_cast<int>(bits)), below));
}

// The value of each column of a half as float32, anything where no weight exists. int8 comes times 2^24.
inline __m512 spread(uint32_t bits, int half, const BFloat16* values) {
  const __m512i odd = _mm512_slli_epi32(positions(bits, half), 16);
  return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, odd, _mm512_loadu_si512(values)));
}
inline __m512 spread(uint32_t bits, int half, const Float16* values) {
  const __m512i places = positions(bits, half);
  const __m512i spread = _mm512_permutexvar_epi16(places, _mm512_loadu_si512(values));
  return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(spread));
}
inline __m512 spread(uint32_t bits, int half, const float* values) {
  values += half ? __builtin_popcount(bits & 0xffff) : 0;
  return _mm512_permutexvar_ps(positions(bits >> 16 * half, 0), _mm512_loadu_ps(values));
}
inline __m512 spread(uint32_t bits, int half, const int8_t* values) {
  const __m512i packed = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
  const __m512i highest = _mm512_slli_epi32(positions(bits, half), 24);
  return _mm512_cvtepi32_ps(_mm512_maskz_permutexvar_epi8(0x8888888888888888, highest, packed));
}

template <typename V> struct Dot {
  __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  void add(uint32_t bits, const V* values, const float* x) {
    for (int half = 0; half < 2; ++half) {
      const __m512 weights = spread(bits, half, values);
      const __mmask16 exists = static_cast<__mmask16>(bits >> 16 * half);
      sums[half] = _mm512_mask3_fmadd_ps(weights, _mm512_load_ps(x + 16 * half), sums[half], exists);
    }
  }
  float total() const {
    const float sum = _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1]));
    return std::is_same_v<V, int8_t> ? sum * 0x1p-24f : sum;
  }
};

#else

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
  __m256 sums[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
  void add(uint32_t bits, const V* values, const float* x) {
    for (int part = 0; part < 4; ++part) {
      const uint32_t byte = bits >> (8 * part) & 0xff;
      const __m256i source = _mm256_load_si256(reinterpret_cast<const __m256i*>(kExpansion.source[byte]));
      const __m256 present = _mm256_load_ps(reinterpret_cast<const float*>(kExpansion.present[byte]));
      const __m256 expanded = _mm256_and_ps(_mm256_permutevar8x32_ps(load8(values), source), present);
      sums[part] = _mm256_fmadd_ps(expanded, _mm256_loadu_ps(x + 8 * part), sums[part]);
      values += __builtin_popcount(byte);
    }
  }
  float total() const {
    const __m256 sum = _mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3]));
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, sum);
    return ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
  }
};

#else

template <typename V> struct Dot {
  float sum = 0;
  void add(uint32_t bits, const V* values, const float* x) {
    for (; bits; bits &= bits - 1) sum += to_float(*values++) * x[__builtin_ctz(bits)];
  }
  float total() const { return sum; }
};

#endif
#endif

}  // namespace

extern "C" {

// Rows of a sparse matrix. `values` must be readable for 64 bytes beyond its end.
struct NtMatrix {
  int64_t rows, columns;
  const uint32_t* bitmap;   // [rows, ceil(columns / 32)]; null: dense, all values are stored
  const void* values;       // of the existing weights, row by row
  const int64_t* starts;    // [rows], where in `values` each row begins
  const float* scales;      // [rows] for int8, else null
  int32_t type;             // see Type
};

}  // extern "C"

namespace {

// y[0..Rows) = the products of as many rows with x; several rows at a time share the loads of x.
template <typename V, int Rows> void dot_rows(const NtMatrix& a, int64_t row, const float* x, float* y) {
  const int64_t words = words_per_row(a.columns);
  const V* values[Rows];
  Dot<V> dots[Rows];
  for (int r = 0; r < Rows; ++r) values[r] = static_cast<const V*>(a.values) + a.starts[row + r];
  const auto add = [&](int r, uint32_t bits, int64_t word) {
    __builtin_prefetch(reinterpret_cast<const char*>(values[r]) + kPrefetch);
    dots[r].add(bits, values[r], x + word * kBits);
    values[r] += __builtin_popcount(bits);
  };
  if (a.bitmap == nullptr) {
    const int64_t whole = a.columns / kBits;
    for (int64_t word = 0; word < whole; ++word)
      for (int r = 0; r < Rows; ++r) add(r, ~0u, word);
    if (const int64_t rest = a.columns % kBits)
      for (int r = 0; r < Rows; ++r) add(r, (1u << rest) - 1, whole);
  } else {
    const uint32_t* bitmap = a.bitmap + row * words;
    for (int64_t word = 0; word < words; ++word)
      for (int r = 0; r < Rows; ++r) add(r, bitmap[r * words + word], word);
  }
  for (int r = 0; r < Rows; ++r) y[r] = a.scales ? dots[r].total() * a.scales[row + r] : dots[r].total();
}

// Calls `function` with a value of the C++ type that a matrix holds.
template <typename F> void with_type(int32_t type, F&& function) {
  switch (type) {
    case kBFloat16: return function(BFloat16{});
    case kFloat16: return function(Float16{});
    case kFloat32: return function(float{});
    case kInt8: return function(int8_t{});
  }
}

// ---- Several tokens: Y = A X, tokens along the vector registers --------------------------------------------------

constexpr int64_t kRowBlock = 64;

typedef float Lanes __attribute__((vector_size(64), may_alias));
constexpr int64_t kLanes = 16;

// Columns at a time, so that their part of X, for 16 * Registers tokens in float32, stays in a level-1 cache.
template <int Registers> constexpr int64_t kColumnBlock = 256 / Registers;

// The existing weights of some columns of one row, unpacked.
template <int64_t Columns> struct Unpacked {
  alignas(64) uint16_t columns[Columns + kBits];
  alignas(64) float values[Columns + kBits];
  int count = 0;

#if NT_AVX512
  static void widen(const BFloat16* values, float* out) {
    const __m512i packed = _mm512_loadu_si512(values);
    _mm512_storeu_ps(out, _mm512_castsi512_ps(_mm512_slli_epi32(
                              _mm512_cvtepu16_epi32(_mm512_castsi512_si256(packed)), 16)));
    _mm512_storeu_ps(out + 16, _mm512_castsi512_ps(_mm512_slli_epi32(
                                   _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(packed, 1)), 16)));
  }
  static void widen(const Float16* values, float* out) {
    const __m512i packed = _mm512_loadu_si512(values);
    _mm512_storeu_ps(out, _mm512_cvtph_ps(_mm512_castsi512_si256(packed)));
    _mm512_storeu_ps(out + 16, _mm512_cvtph_ps(_mm512_extracti64x4_epi64(packed, 1)));
  }
  static void widen(const int8_t* values, float* out) {
    const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
    _mm512_storeu_ps(out, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(packed))));
    _mm512_storeu_ps(out + 16, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(packed, 1))));
  }
  template <typename V> void add(uint32_t bits, const V* from, uint32_t first) {
    alignas(64) static const uint16_t kCount[32] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                                    16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
    const __m512i places = _mm512_add_epi16(_mm512_load_si512(kCount), _mm512_set1_epi16(static_cast<short>(first)));
    _mm512_storeu_si512(columns + count, _mm512_maskz_compress_epi16(bits, places));
    const int added = __builtin_popcount(bits);
    if constexpr (std::is_same_v<V, float>) {
      std::memcpy(values + count, from, sizeof(float) * added);
    } else {
      widen(from, values + count);
    }
    count += added;
  }
#else
  template <typename V> void add(uint32_t bits, const V* from, uint32_t first) {
    for (; bits; bits &= bits - 1, ++count) {
      columns[count] = static_cast<uint16_t>(first + __builtin_ctz(bits));
      values[count] = to_float(*from++);
    }
  }
#endif
};

// Adds the unpacked weights times their rows of `x` [columns, tokens] to `y` [tokens]; tokens = 16 * Registers.
template <int Registers, int64_t Columns>
void accumulate(const Unpacked<Columns>& row, const float* x, float* y) {
  // Enough independent sums to hide the latency of an addition.
  constexpr int chains = Registers >= 4 ? 1 : 4 / Registers;
  Lanes sums[chains][Registers] = {};
  const auto add = [&](Lanes* sum, int i) {
    const float* x_row = x + row.columns[i] * (Registers * kLanes);
    const float value = row.values[i];
    for (int r = 0; r < Registers; ++r) sum[r] += value * *reinterpret_cast<const Lanes*>(x_row + r * kLanes);
  };
  int i = 0;
  for (; i + chains <= row.count; i += chains)
    for (int chain = 0; chain < chains; ++chain) add(sums[chain], i + chain);
  for (; i < row.count; ++i) add(sums[0], i);
  for (int r = 0; r < Registers; ++r) {
    for (int chain = 1; chain < chains; ++chain) sums[0][r] += sums[chain][r];
    *reinterpret_cast<Lanes*>(y + r * kLanes) += sums[0][r];
  }
}

// A block of rows for one tile of tokens: y [rows, tokens] = A[rows] x [columns, tokens].
template <typename V, int Registers>
void multiply_rows(const NtMatrix& a, int64_t first, int64_t last, const float* x, float* y) {
  constexpr int64_t tokens = Registers * kLanes;
  const int64_t words = words_per_row(a.columns);
  const V* next[kRowBlock];
  for (int64_t row = first; row < last; ++row) next[row - first] = static_cast<const V*>(a.values) + a.starts[row];
  std::memset(y, 0, sizeof(float) * (last - first) * tokens);
  constexpr int64_t step = kColumnBlock<Registers> / kBits;
  for (int64_t begin = 0; begin < words; begin += step) {
    const int64_t end = std::min(words, begin + step);
    for (int64_t row = first; row < last; ++row) {
      Unpacked<kColumnBlock<Registers>> unpacked;
      const V*& values = next[row - first];
      for (int64_t word = begin; word < end; ++word) {
        const int64_t width = std::min(kBits, a.columns - word * kBits);
        const uint32_t all = width == kBits ? ~0u : (1u << width) - 1;
        const uint32_t bits = a.bitmap ? a.bitmap[row * words + word] : all;
        unpacked.add(bits, values, static_cast<uint32_t>((word - begin) * kBits));
        values += __builtin_popcount(bits);
      }
      accumulate<Registers>(unpacked, x + begin * kBits * tokens, y + (row - first) * tokens);
    }
  }
  if (a.scales)
    for (int64_t row = first; row < last; ++row)
      for (int64_t token = 0; token < tokens; ++token) y[(row - first) * tokens + token] *= a.scales[row];
}

// Y [tokens, rows] = X [tokens, columns] A^T for the tokens of one tile.
template <typename V, int Registers>
void multiply_tile(const NtMatrix& a, const float* x, float* y, int64_t tokens) {
  constexpr int64_t width = Registers * kLanes;
  const int64_t padded = words_per_row(a.columns) * kBits;
  Buffer tile(padded * width);
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (int64_t block = 0; block < padded; block += kBits) {
      std::memset(tile.data() + block * width, 0, sizeof(float) * kBits * width);
      for (int64_t token = 0; token < tokens; ++token)
        for (int64_t column = block; column < std::min(a.columns, block + kBits); ++column)
          tile.data()[column * width + token] = x[token * a.columns + column];
    }
    alignas(64) float out[kRowBlock * width];
#pragma omp for schedule(dynamic)
    for (int64_t first = 0; first < a.rows; first += kRowBlock) {
      const int64_t last = std::min(a.rows, first + kRowBlock);
      multiply_rows<V, Registers>(a, first, last, tile.data(), out);
      for (int64_t token = 0; token < tokens; ++token)
        for (int64_t row = first; row < last; ++row)
          y[token * a.rows + row] = out[(row - first) * width + token];
    }
  }
}

// Calls `take(row, value)` with each product of a row and `x`, in a team of threads; returns without waiting for them.
template <typename Take> void each_row(const NtMatrix& a, const float* x, Take&& take) {
  with_type(a.type, [&](auto type) {
    using V = decltype(type);
    constexpr int64_t step = 2;
#pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < a.rows; row += step) {
      float y[step];
      if (row + step <= a.rows) {
        dot_rows<V, step>(a, row, x, y);
        for (int64_t r = 0; r < step; ++r) take(row + r, y[r]);
      } else {
        dot_rows<V, 1>(a, row, x, y);
        take(row, y[0]);
      }
    }
  });
}

// `x` with zeros up to a whole word, as the products read it.
void pad(const float* x, int64_t columns, float* padded) {
  std::memcpy(padded, x, sizeof(float) * columns);
  std::memset(padded + columns, 0, sizeof(float) * (words_per_row(columns) * kBits - columns));
}

void multiply_vector(const NtMatrix& a, const float* x, float* y) {
  Buffer padded(words_per_row(a.columns) * kBits);
  pad(x, a.columns, padded.data());
#pragma omp parallel
  each_row(a, padded.data(), [&](int64_t row, float value) { y[row] = value; });
}

template <typename V> void multiply(const NtMatrix& a, const float* x, float* y, int64_t tokens) {
  while (tokens > 0) {
    int64_t taken;
    if (tokens <= 2) {
      multiply_vector(a, x, y);
      taken = 1;
    } else if (tokens <= 16) {
      multiply_tile<V, 1>(a, x, y, taken = tokens);
    } else if (tokens <= 32) {
      multiply_tile<V, 2>(a, x, y, taken = tokens);
    } else if (tokens <= 64) {
      multiply_tile<V, 4>(a, x, y, taken = tokens);
    } else {
      multiply_tile<V, 8>(a, x, y, taken = std::min<int64_t>(tokens, 128));
    }
    x += taken * a.columns;
    y += taken * a.rows;
    tokens -= taken;
  }
}

}  // namespace

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
  float sum = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  return sum;
}

void normalize(const float* x, const float* weight, int64_t size, float epsilon, float* out) {
  float square = 0;
  for (int64_t i = 0; i < size; ++i) square += x[i] * x[i];
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

// Softmax attention of one query over `length` keys and values [length, size].
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
  float weight = 0;
  for (int64_t t = 0; t < length; ++t) weight += scores[t] = std::exp(scores[t] - highest);
  for (int64_t i = 0; i < size; i += kLanes) {
    Lanes sum = {};
    for (int64_t t = 0; t < length; ++t) sum += scores[t] * load_lanes(values + t * size + i);
    *reinterpret_cast<Lanes*>(out + i) = sum / weight;
  }
}

// Where one token's activations live between the phases, for each of `streams` networks side by side.
struct Activations {
  int64_t stride;
  Buffer query, key, value, attention, mlp;
  Activations(const NtPlan& p, int64_t streams)
      : stride((std::max({p.hidden, p.intermediate, p.attention_heads * p.head_size}) + kBits - 1) / kBits * kBits),
        query(streams * stride), key(streams * stride), value(streams * stride), attention(streams * stride),
        mlp(streams * stride) {}
};

// One layer of all streams; `layers[s * apart]` belongs to stream s, as do slots `slot + s * apart` of the cache.
template <typename C>
void decode_layer(const NtPlan& p, int64_t streams, const NtLayer* layers, int64_t apart, C* const* keys,
                  C* const* values, int64_t capacity, int64_t position, const float* cosine, const float* sine,
                  Activations& act, float* hidden, float* input, float* scores) {
  const int64_t size = p.head_size, group = p.attention_heads / p.key_value_heads;
  for (int64_t s = 0; s < streams; ++s) {
    const NtLayer& layer = layers[s * apart];
    const int64_t base = s * act.stride;
    normalize(hidden + base, layer.attention_norm, p.hidden, p.epsilon, input);
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
      attend(turned, key, value, position + 1, size, p.scaling, scores,
             act.attention.data() + s * act.stride + q * size);
    }
  }
  for (int64_t s = 0; s < streams; ++s) {
    const int64_t base = s * act.stride;
    pad(act.attention.data() + base, p.attention_heads * size, input);
    each_row(layers[s * apart].output, input, [&](int64_t row, float value) { hidden[base + row] += value; });
  }
#pragma omp barrier
  for (int64_t s = 0; s < streams; ++s) {
    const NtLayer& layer = layers[s * apart];
    const int64_t base = s * act.stride;
    normalize(hidden + base, layer.mlp_norm, p.hidden, p.epsilon, input);
    each_row(layer.gate, input, [&](int64_t row, float value) { act.mlp.data()[base + row] = value; });
    // The same thread takes the same rows of both matrices: they have the same shape.
    each_row(layer.up, input, [&](int64_t row, float value) {
      const float gate = act.mlp.data()[base + row];
      act.mlp.data()[base + row] = gate / (1 + std::exp(-gate)) * value;
    });
  }
#pragma omp barrier
  for (int64_t s = 0; s < streams; ++s) {
    const int64_t base = s * act.stride;
    pad(act.mlp.data() + base, p.intermediate, input);
    each_row(layers[s * apart].down, input, [&](int64_t row, float value) { hidden[base + row] += value; });
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
    Buffer input(act.stride), scores(position + 1);
    std::memset(input.data(), 0, sizeof(float) * act.stride);
    const auto layer = [&](int64_t streams_, int64_t slot, int64_t apart) {
      decode_layer(p, streams_, p.layers + slot, apart, key_slots + slot, value_slots + slot, capacity, position,
                   cosine, sine, act, hidden.data(), input.data(), scores.data());
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
