// Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
//
// One or two tokens, whose activations are bfloat16, by looking activations up instead of spreading values.
//
// The layout is SELL-C-sigma (Kreutzer et al. 2014, arXiv:1307.6209) within blocks. A block is the weights of up to 256
// rows and of so many columns as the processor's byte shuffles can look up in registers, where the columns' activations
// stay while the block is read. Its rows are sorted by their number of weights and taken a chunk at a time, one row to a
// lane; a step holds the next weight of each row of a chunk: its column, a byte, and its value. Rows of a chunk that
// have fewer weights than its longest are filled up with zeros, a tenth at a density of 0.2.
//
// A step takes the same time whatever the density is, and looks up as many weights as there are lanes; products by the
// bitmap take the same time for each 32 columns instead, however few weights there are.

#pragma once

#include "matrix.h"

namespace {

constexpr int64_t kSlicedTokens = 2;       // at most, of products by slices
constexpr int64_t kBlockRows = 256;        // at most, so that a byte names one
constexpr int64_t kPrefetchSlices = 2048;  // bytes ahead

#if NT_AVX512
constexpr int kChunk = 64;
constexpr int64_t kTable = 256;
#elif NT_AVX2
constexpr int kChunk = 32;
constexpr int64_t kTable = 64;
#else
constexpr int kChunk = 16;
constexpr int64_t kTable = 64;
#endif

typedef uint8_t Bytes __attribute__((vector_size(kChunk), may_alias));
typedef uint32_t Words __attribute__((vector_size(kChunk), may_alias));
typedef int32_t Integers __attribute__((vector_size(kChunk)));
typedef float Floats __attribute__((vector_size(kChunk), may_alias));

inline Bytes load_bytes(const uint8_t* from) { return *reinterpret_cast<const Bytes*>(from); }

// The bytes of two registers in turn, of the lower or the upper half of each 16; one byte of each column's activation.
#if NT_AVX512

inline Bytes interleave_lower(Bytes a, Bytes b) {
  return reinterpret_cast<Bytes>(_mm512_unpacklo_epi8(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
}
inline Bytes interleave_upper(Bytes a, Bytes b) {
  return reinterpret_cast<Bytes>(_mm512_unpackhi_epi8(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
}

class Table {
 public:
  explicit Table(const uint8_t* from) {
    for (int i = 0; i < 4; ++i) parts_[i] = _mm512_load_si512(from + 64 * i);
  }
  Bytes at(Bytes columns) const {
    const __m512i where = reinterpret_cast<__m512i>(columns);
    const __m512i lower = _mm512_permutex2var_epi8(parts_[0], where, parts_[1]);
    const __m512i upper = _mm512_permutex2var_epi8(parts_[2], where, parts_[3]);
    return reinterpret_cast<Bytes>(_mm512_mask_blend_epi8(_mm512_movepi8_mask(where), lower, upper));
  }

 private:
  __m512i parts_[4];
};

#elif NT_AVX2

inline Bytes interleave_lower(Bytes a, Bytes b) {
  return reinterpret_cast<Bytes>(_mm256_unpacklo_epi8(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
}
inline Bytes interleave_upper(Bytes a, Bytes b) {
  return reinterpret_cast<Bytes>(_mm256_unpackhi_epi8(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
}

class Table {
 public:
  explicit Table(const uint8_t* from) {
    for (int i = 0; i < 4; ++i)
      parts_[i] = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(from + 16 * i)));
  }
  Bytes at(Bytes columns) const {
    const __m256i where = reinterpret_cast<__m256i>(columns);
    // Bits 4 and 5 tell the part; blends read bit 7.
    const __m256i odd = _mm256_slli_epi16(where, 3), upper = _mm256_slli_epi16(where, 2);
    const auto either = [&](int i) {
      return _mm256_blendv_epi8(_mm256_shuffle_epi8(parts_[i], where), _mm256_shuffle_epi8(parts_[i + 1], where), odd);
    };
    return reinterpret_cast<Bytes>(_mm256_blendv_epi8(either(0), either(2), upper));
  }

 private:
  __m256i parts_[4];
};

#elif NT_NEON

inline Bytes interleave_lower(Bytes a, Bytes b) {
  return reinterpret_cast<Bytes>(vzip1q_u8(reinterpret_cast<uint8x16_t>(a), reinterpret_cast<uint8x16_t>(b)));
}
inline Bytes interleave_upper(Bytes a, Bytes b) {
  return reinterpret_cast<Bytes>(vzip2q_u8(reinterpret_cast<uint8x16_t>(a), reinterpret_cast<uint8x16_t>(b)));
}

class Table {
 public:
  explicit Table(const uint8_t* from) : parts_(vld1q_u8_x4(from)) {}
  Bytes at(Bytes columns) const {
    return reinterpret_cast<Bytes>(vqtbl4q_u8(parts_, reinterpret_cast<uint8x16_t>(columns)));
  }

 private:
  uint8x16x4_t parts_;
};

#else

inline Bytes interleave(Bytes a, Bytes b, int half) {
  Bytes both;
  for (int i = 0; i < 16; ++i) both[i] = i % 2 ? b[8 * half + i / 2] : a[8 * half + i / 2];
  return both;
}
inline Bytes interleave_lower(Bytes a, Bytes b) { return interleave(a, b, 0); }
inline Bytes interleave_upper(Bytes a, Bytes b) { return interleave(a, b, 1); }

class Table {
 public:
  explicit Table(const uint8_t* from) : from_(from) {}
  Bytes at(Bytes columns) const {
    Bytes found;
    for (int i = 0; i < kChunk; ++i) found[i] = from_[columns[i]];
    return found;
  }

 private:
  const uint8_t* from_;
};

#endif

// bfloat16 activations as slices read them: for each block of columns their lower bytes, then their upper ones.
inline int64_t plane_bytes(int64_t columns) { return 2 * round_up(columns, kTable); }

template <typename From> void to_planes(const From* x, int64_t columns, uint8_t* planes) {
  for (int64_t first = 0; first < columns; first += kTable, planes += 2 * kTable) {
    const int64_t count = std::min(columns - first, kTable);
    for (int64_t i = 0; i < count; ++i) {
      const uint16_t bits = to_bfloat16(to_float(x[first + i])).bits;
      planes[i] = static_cast<uint8_t>(bits);
      planes[kTable + i] = static_cast<uint8_t>(bits >> 8);
    }
  }
}

// Row `q` of a chunk is in lane `q % quarter` of the sums number `q / quarter`. What is interleaved and then taken apart
// into even and odd 16 bits comes from this byte of a register, and becomes this one of two registers' 16 bits.
constexpr int kQuarter = kChunk / 4;
constexpr int byte_of(int q) {
  const int sum = q / kQuarter, lane = q % kQuarter;
  return lane / 4 * 16 + 2 * lane % 8 + sum % 2 + sum / 2 * 8;
}
constexpr int half_of(int q) {
  const int sum = q / kQuarter, lane = q % kQuarter;
  return sum / 2 * 2 * kQuarter + 2 * lane + sum % 2;
}

template <typename V> constexpr int64_t kStepBytes = kChunk * (1 + sizeof(V));

// The bytes before a block's steps: the row of each sum, and the number of steps of each chunk.
inline int64_t header_bytes(int64_t chunks) { return round_up(chunks * (kChunk + sizeof(uint16_t)), kChunk); }

inline Floats even(Bytes halves) { return reinterpret_cast<Floats>(reinterpret_cast<Words>(halves) << 16); }
inline Floats odd(Bytes halves) { return reinterpret_cast<Floats>(reinterpret_cast<Words>(halves) & 0xffff0000u); }

// Register 0 or 1 of a step's values, as the upper bits of float32 or, of int8, of whole numbers.
template <int N> Bytes read_halves(const uint8_t* from, BFloat16) { return load_bytes(from + N * kChunk); }
template <int N> Bytes read_halves(const uint8_t* from, int8_t) {
  return N == 0 ? interleave_lower(Bytes{}, load_bytes(from)) : interleave_upper(Bytes{}, load_bytes(from));
}
constexpr float kInt8Unit = 0x1p-24f;
inline Floats value(Floats bits, BFloat16) { return bits; }
inline Floats value(Floats bits, int8_t) {
  return __builtin_convertvector(reinterpret_cast<Integers>(bits), Floats);
}

// Adds the products of a block with `planes`, the activations of its columns, to `sums` [rows]; returns the block's end.
template <typename V>
inline __attribute__((always_inline)) const uint8_t* add_block(const uint8_t* block, int64_t chunks,
                                                               const uint8_t* planes, float* sums) {
  const Table lower(planes), upper(planes + kTable);
  const uint8_t* const rows = block;
  const uint16_t* const steps = reinterpret_cast<const uint16_t*>(block + chunks * kChunk);
  alignas(64) float products[kBlockRows];
  block += header_bytes(chunks);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    Floats own[4] = {};
    for (int step = steps[chunk]; step > 0; --step, block += kStepBytes<V>) {
      for (int64_t line = 0; line < kStepBytes<V>; line += 64) __builtin_prefetch(block + line + kPrefetchSlices);
      const Bytes columns = load_bytes(block);
      const Bytes low = lower.at(columns), high = upper.at(columns);
      const auto add = [&](Bytes activations, Bytes values, Floats* to) {
        to[0] += value(even(values), V{}) * even(activations);
        to[1] += value(odd(values), V{}) * odd(activations);
      };
      add(interleave_lower(low, high), read_halves<0>(block + kChunk, V{}), own);
      add(interleave_upper(low, high), read_halves<1>(block + kChunk, V{}), own + 2);
    }
    float* const to = products + chunk * kChunk;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) *reinterpret_cast<Floats*>(to + i * kQuarter) = own[i];
  }
#pragma GCC unroll 16
  for (int64_t i = 0; i < chunks * kChunk; ++i) sums[rows[i]] += products[i];
  return block;
}

// The chunks of blocks: enough blocks for every thread to have some.
inline int64_t chunks_of(int64_t rows, int64_t threads) {
  return std::clamp<int64_t>(rows / (2 * threads * kChunk), 1, kBlockRows / kChunk);
}

// The rows of a block, those with the most weights first.
struct Sorted {
  int64_t counts[kBlockRows] = {};
  uint8_t order[kBlockRows];

  // Of `rows` rows from `first` on, filled up by empty ones to `all`; of the words from `begin` to `end`.
  Sorted(const NtMatrix& a, int64_t first, int64_t rows, int64_t all, int64_t begin, int64_t end) {
    const int64_t words = words_per_row(a.columns);
    int64_t places[kTable + 2] = {};  // where rows of kTable, kTable - 1, ... weights begin
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t word = begin; word < end; ++word)
        counts[row] += __builtin_popcount(a.bitmap[(first + row) * words + word]);
    for (int64_t row = 0; row < all; ++row) ++places[kTable - counts[row] + 1];
    for (int64_t place = 0; place <= kTable; ++place) places[place + 1] += places[place];
    for (int64_t row = 0; row < all; ++row) order[places[kTable - counts[row]]++] = static_cast<uint8_t>(row);
  }
  int64_t steps(int64_t chunk) const { return counts[order[chunk * kChunk]]; }
};

// Writes lane `q` of a chunk's steps: the weights of a row that `bits`, the words of a block, tell of. Returns the next.
template <typename V>
const V* write_lane(const NtWord* bits, int64_t words, const V* values, int q, uint8_t* step) {
  const int64_t place = sizeof(V) == 1 ? byte_of(q) : half_of(q);
  for (int64_t word = 0; word < words; ++word)
    for (uint32_t left = bits[word]; left; left &= left - 1, step += kStepBytes<V>) {
      step[byte_of(q)] = static_cast<uint8_t>(word * kBits + __builtin_ctz(left));
      std::memcpy(step + kChunk + place * sizeof(V), values++, sizeof(V));
    }
  return values;
}

// Writes the blocks of the rows from `first` on to `out`, if there is one; returns their bytes.
template <typename V> int64_t slice_rows(const NtMatrix& a, int64_t first, int64_t chunks, uint8_t* const out) {
  const int64_t words = words_per_row(a.columns), all = chunks * kChunk, rows = std::min(all, a.rows - first);
  const V* values[kBlockRows];
  for (int64_t row = 0; row < rows; ++row) values[row] = static_cast<const V*>(a.values) + a.starts[first + row];
  int64_t bytes = 0;
  for (int64_t begin = 0; begin < words; begin += kTable / kBits) {
    const int64_t end = std::min(words, begin + kTable / kBits);
    const Sorted sorted(a, first, rows, all, begin, end);
    uint8_t* const header = out + bytes;
    bytes += header_bytes(chunks);
    if (out) std::memcpy(header, sorted.order, all);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const uint16_t steps = static_cast<uint16_t>(sorted.steps(chunk));
      if (out) {
        std::memcpy(header + all + chunk * sizeof steps, &steps, sizeof steps);
        std::memset(out + bytes, 0, steps * kStepBytes<V>);
        for (int q = 0; q < kChunk; ++q)
          if (const int64_t row = sorted.order[chunk * kChunk + q]; row < rows)
            values[row] = write_lane(a.bitmap + (first + row) * words + begin, end - begin, values[row], q, out + bytes);
      }
      bytes += steps * kStepBytes<V>;
    }
  }
  return bytes;
}

// Calls `take(index, first row, chunks)` for every block of rows.
template <typename Take> void each_block(const NtMatrix& a, int64_t chunks, Take&& take) {
  const int64_t step = chunks * kChunk;
#pragma omp parallel for schedule(dynamic)
  for (int64_t first = 0; first < a.rows; first += step)
    take(first / step, first, std::min(chunks, (a.rows - first + kChunk - 1) / kChunk));
}

template <typename V> void measure_slices(const NtMatrix& a, int64_t chunks, int64_t* starts) {
  each_block(a, chunks, [&](int64_t block, int64_t first, int64_t own) {
    starts[block + 1] = slice_rows<V>(a, first, own, nullptr);
  });
  starts[0] = 0;
  for (int64_t row = 0, block = 0; row < a.rows; row += chunks * kChunk, ++block) starts[block + 1] += starts[block];
}

template <typename V> void write_slices(const NtMatrix& a, uint8_t* out) {
  each_block(a, a.slice_chunks, [&](int64_t block, int64_t first, int64_t own) {
    slice_rows<V>(a, first, own, out + a.slice_starts[block]);
  });
}

// Whether products of so many tokens, of activations of type X, go by slices.
template <typename X> bool by_slices(const NtMatrix& a, int64_t tokens) {
  return std::is_same_v<X, BFloat16> && a.slices != nullptr && tokens <= kSlicedTokens;
}

}  // namespace
