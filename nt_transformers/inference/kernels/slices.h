// Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
//
// One or two tokens, whose activations are bfloat16, by looking activations up instead of spreading values.
//
// The layout is SELL-C-sigma (Kreutzer et al. 2014, arXiv:1307.6209) within blocks. A block is the weights of up to 256
// rows and of so many columns as the processor's byte shuffles can look up in registers, where the columns' activations
// stay while the block is read. Its rows are sorted by their number of weights and taken a chunk at a time, one row to a
// lane; a step holds the next weight of each row of a chunk: its value, and its column, a byte, or the distance from
// the one before, half a byte, which takes less memory unless few weights exist. Rows of a chunk that have fewer weights
// than its longest are filled up with zeros, a tenth at a density of 0.2.
//
// A step takes the same time whatever the density is, and looks up as many weights as there are lanes; products by the
// bitmap take the same time for each 32 columns instead, however few weights there are.

#pragma once

#include <vector>

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

using Bytes = Vector<uint8_t, kChunk>::Type;
using Words = Vector<uint32_t, kLanes>::Type;
using Integers = Vector<int32_t, kLanes>::Type;

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

template <typename From> void to_planes(const From* x, int64_t columns, float unit, uint8_t* planes) {
  for (int64_t first = 0; first < columns; first += kTable, planes += 2 * kTable) {
    const int64_t count = std::min(columns - first, kTable);
    for (int64_t i = 0; i < count; ++i) {
      const uint16_t bits = to_bfloat16(to_float(x[first + i]) * unit).bits;
      planes[i] = static_cast<uint8_t>(bits);
      planes[kTable + i] = static_cast<uint8_t>(bits >> 8);
    }
  }
}

// Row `q` of a chunk is in lane `q % kLanes` of the sums number `q / kLanes`. What is interleaved and then taken apart
// into even and odd 16 bits comes from this byte of a register, and becomes this one of two registers' 16 bits.
constexpr int byte_of(int q) {
  const int sum = q / kLanes, lane = q % kLanes;
  return lane / 4 * 16 + 2 * lane % 8 + sum % 2 + sum / 2 * 8;
}
constexpr int half_of(int q) {
  const int sum = q / kLanes, lane = q % kLanes;
  return sum / 2 * 2 * kLanes + 2 * lane + sum % 2;
}

// Where the steps of a chunk have their columns, `Bits` each, and their values. The columns of 8 / Bits steps share a
// register, which the values of those steps follow.
template <typename V, int Bits> struct Steps {
  static constexpr int64_t kTogether = 8 / Bits, kValues = kChunk * sizeof(V);
  static int64_t bytes(int64_t steps) { return (steps + kTogether - 1) / kTogether * kChunk + steps * kValues; }
  static int64_t columns(int64_t step) { return step / kTogether * (kChunk + kTogether * kValues); }
  static int64_t values(int64_t step) { return columns(step) + kChunk + step % kTogether * kValues; }
};

// The bytes before a block's steps: the row of each sum, and the number of steps of each chunk.
inline int64_t header_bytes(int64_t chunks) { return round_up(chunks * (kChunk + sizeof(uint16_t)), kChunk); }

inline Lanes even(Bytes halves) { return reinterpret_cast<Lanes>(reinterpret_cast<Words>(halves) << 16); }
inline Lanes odd(Bytes halves) { return reinterpret_cast<Lanes>(reinterpret_cast<Words>(halves) & 0xffff0000u); }

// Register 0 or 1 of a step's values, as the upper bits of float32 or, of int8, of whole numbers.
template <int N> Bytes read_halves(const uint8_t* from, BFloat16) { return load_bytes(from + N * kChunk); }
template <int N> Bytes read_halves(const uint8_t* from, int8_t) {
  return N == 0 ? interleave_lower(Bytes{}, load_bytes(from)) : interleave_upper(Bytes{}, load_bytes(from));
}
inline Lanes value(Lanes bits, BFloat16) { return bits; }
inline Lanes value(Lanes bits, int8_t) { return __builtin_convertvector(reinterpret_cast<Integers>(bits), Lanes); }
// Of the activations, whose products are with those values.
template <typename V> constexpr float kUnit = std::is_same_v<V, int8_t> ? 0x1p-24f : 1;

// Adds the products of a block with `planes`, the activations of its columns, to `sums` [rows]; returns the block's end.
template <typename V, int Bits>
inline __attribute__((always_inline)) const uint8_t* add_block(const uint8_t* block, int64_t chunks,
                                                               const uint8_t* planes, float* sums) {
  using Layout = Steps<V, Bits>;
  const Table lower(planes), upper(planes + kTable);
  const uint8_t* const rows = block;
  const uint16_t* const steps = reinterpret_cast<const uint16_t*>(block + chunks * kChunk);
  alignas(64) float products[kBlockRows];
  block += header_bytes(chunks);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    Lanes own[4] = {};
    const auto add = [&](Bytes columns, const uint8_t* values) {
      const Bytes low = lower.at(columns), high = upper.at(columns);
      const auto add_half = [&](Bytes activations, Bytes halves, Lanes* to) {
        to[0] += value(even(halves), V{}) * even(activations);
        to[1] += value(odd(halves), V{}) * odd(activations);
      };
      add_half(interleave_lower(low, high), read_halves<0>(values, V{}), own);
      add_half(interleave_upper(low, high), read_halves<1>(values, V{}), own + 2);
    };
    const int64_t all = steps[chunk];
    Bytes columns = {};
    for (int64_t step = 0; step < all; step += Layout::kTogether) {
      const uint8_t* const from = block + Layout::columns(step);
      for (int64_t line = 0; line < Layout::bytes(Layout::kTogether); line += 64)
        __builtin_prefetch(from + line + kPrefetchSlices);
      if constexpr (Bits == 8) {
        add(load_bytes(from), from + Layout::values(0));
      } else {
        const Bytes both = load_bytes(from);
        add(columns += both & 15, from + Layout::values(0));
        if (step + 1 == all) break;
        add(columns += both >> 4, from + Layout::values(1));
      }
    }
    block += Layout::bytes(all);
    float* const to = products + chunk * kChunk;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) store_lanes(own[i], to + i * kLanes);
  }
#pragma GCC unroll 16
  for (int64_t i = 0; i < chunks * kChunk; ++i) sums[rows[i]] += products[i];
  return block;
}

// The chunks of blocks: enough blocks for every thread to have some, of rows enough to be sorted.
inline int64_t chunks_of(int64_t rows, int64_t threads) {
  return std::clamp<int64_t>(rows / (2 * threads * kChunk), 2, kBlockRows / kChunk);
}

// Calls `take(column, exists)` with the entries of a row, whose words of a block are `bits`: each weight's column, or of
// 4 bits its distance from the one before, where longer ones take several entries, the last of which exists.
template <int Bits, typename Take> void each_entry(const NtWord* bits, int64_t words, Take&& take) {
  int64_t before = 0;
  for (int64_t word = 0; word < words; ++word)
    for (uint32_t left = bits[word]; left; left &= left - 1) {
      const int64_t column = word * kBits + __builtin_ctz(left);
      if constexpr (Bits == 8) {
        take(column, true);
      } else {
        for (; column - before > 15; before += 15) take(15, false);
        take(column - before, true);
        before = column;
      }
    }
}

template <int Bits> int64_t count_entries(const NtWord* bits, int64_t words) {
  int64_t count = 0, before = 0;
  for (int64_t word = 0; word < words; ++word) {
    const uint32_t own = bits[word];
    count += __builtin_popcount(own);
    if (Bits == 8 || own == 0) continue;
    const int64_t first = __builtin_ctz(own), last = kBits - 1 - __builtin_clz(own);
    count += (std::max<int64_t>(word * kBits + first - before, 1) - 1) / 15;
    before = word * kBits + last;
    // Between two of its weights a word has room for one longer distance, of two entries, or if it is 31 of three.
    uint32_t zeros = ~own >> first & ((1u << (last - first)) - 1);
    for (const int more : {1, 2, 4, 7}) zeros &= zeros >> more;
    count += (zeros != 0) + (own == 0x80000001u);
  }
  return count;
}

// The rows of a block, those with the most entries first.
template <int Bits> struct Sorted {
  int64_t counts[kBlockRows] = {};
  uint8_t order[kBlockRows];

  // Of `rows` rows from `first` on, filled up by empty ones to `all`; of the words from `begin` to `end`.
  Sorted(const NtMatrix& a, int64_t first, int64_t rows, int64_t all, int64_t begin, int64_t end) {
    const int64_t words = words_per_row(a.columns);
    int64_t places[kTable + 2] = {};  // where rows of kTable, kTable - 1, ... entries begin
    for (int64_t row = 0; row < rows; ++row)
      counts[row] = count_entries<Bits>(a.bitmap + (first + row) * words + begin, end - begin);
    for (int64_t row = 0; row < all; ++row) ++places[kTable - counts[row] + 1];
    for (int64_t place = 0; place <= kTable; ++place) places[place + 1] += places[place];
    for (int64_t row = 0; row < all; ++row) order[places[kTable - counts[row]]++] = static_cast<uint8_t>(row);
  }
  int64_t steps(int64_t chunk) const { return counts[order[chunk * kChunk]]; }
};

// Writes lane `q` of a chunk's steps: a row, whose words of a block are `bits`. Returns the row's next values.
template <typename V, int Bits>
const V* write_lane(const NtWord* bits, int64_t words, const V* values, int q, uint8_t* steps) {
  using Layout = Steps<V, Bits>;
  const int64_t place = sizeof(V) == 1 ? byte_of(q) : half_of(q);
  int64_t step = 0;
  each_entry<Bits>(bits, words, [&](int64_t column, bool exists) {
    steps[Layout::columns(step) + byte_of(q)] |= static_cast<uint8_t>(column << step % Layout::kTogether * Bits);
    if (exists) std::memcpy(steps + Layout::values(step) + place * sizeof(V), values++, sizeof(V));
    ++step;
  });
  return values;
}

// The bytes of the blocks of the rows from `first` on, which are written to `out` if there is one.
template <typename V, int Bits> int64_t slice_rows(const NtMatrix& a, int64_t first, int64_t chunks, uint8_t* out) {
  const int64_t words = words_per_row(a.columns), all = chunks * kChunk, rows = std::min(all, a.rows - first);
  const V* values[kBlockRows];
  for (int64_t row = 0; row < rows; ++row) values[row] = static_cast<const V*>(a.values) + a.starts[first + row];
  int64_t bytes = 0;
  for (int64_t begin = 0; begin < words; begin += kTable / kBits) {
    const int64_t end = std::min(words, begin + kTable / kBits);
    const Sorted<Bits> sorted(a, first, rows, all, begin, end);
    const auto write_chunk = [&](int64_t chunk, uint16_t steps, uint8_t* header, uint8_t* to) {
      std::memcpy(header + all + chunk * sizeof steps, &steps, sizeof steps);
      std::memset(to, 0, Steps<V, Bits>::bytes(steps));
      for (int q = 0; q < kChunk; ++q)
        if (const int64_t row = sorted.order[chunk * kChunk + q]; row < rows) {
          const NtWord* const bits = a.bitmap + (first + row) * words + begin;
          values[row] = write_lane<V, Bits>(bits, end - begin, values[row], q, to);
        }
    };
    const int64_t header = bytes;
    if (out) std::memcpy(out + header, sorted.order, all);
    bytes += header_bytes(chunks);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t steps = sorted.steps(chunk);
      if (out) write_chunk(chunk, static_cast<uint16_t>(steps), out + header, out + bytes);
      bytes += Steps<V, Bits>::bytes(steps);
    }
  }
  return bytes;
}

// Calls `take(index, first row, chunks)` for every block of rows.
template <typename Take> void each_block(const NtMatrix& a, Take&& take) {
  const int64_t step = a.slice_chunks * kChunk;
#pragma omp parallel for schedule(dynamic)
  for (int64_t first = 0; first < a.rows; first += step)
    take(first / step, first, std::min(a.slice_chunks, (a.rows - first + kChunk - 1) / kChunk));
}

// Calls `function` with a value of the type of the values, and with the bits of a column as a constant.
template <typename F> void with_slices(const NtMatrix& a, F&& function) {
  if (a.type == kInt8)
    function(int8_t{}, std::integral_constant<int, 8>{});  // distances would take more instructions, not less time
  else if (a.slice_bits == 8)
    function(BFloat16{}, std::integral_constant<int, 8>{});
  else
    function(BFloat16{}, std::integral_constant<int, 4>{});
}

// Where blocks of rows begin, and the last one ends.
inline std::vector<int64_t> measure_slices(const NtMatrix& a) {
  const int64_t step = a.slice_chunks * kChunk;
  std::vector<int64_t> starts((a.rows + step - 1) / step + 1);
  with_slices(a, [&](auto value, auto bits) {
    each_block(a, [&](int64_t block, int64_t first, int64_t chunks) {
      starts[block + 1] = slice_rows<decltype(value), bits>(a, first, chunks, nullptr);
    });
  });
  for (size_t block = 1; block < starts.size(); ++block) starts[block] += starts[block - 1];
  return starts;
}

inline void write_slices(const NtMatrix& a, uint8_t* out) {
  with_slices(a, [&](auto value, auto bits) {
    each_block(a, [&](int64_t block, int64_t first, int64_t chunks) {
      slice_rows<decltype(value), bits>(a, first, chunks, out + a.slice_starts[block]);
    });
  });
}

// Whether products of so many tokens, of activations of type X, go by slices.
template <typename X> bool by_slices(const NtMatrix& a, int64_t tokens) {
  return std::is_same_v<X, BFloat16> && a.slices != nullptr && tokens <= kSlicedTokens;
}

}  // namespace
