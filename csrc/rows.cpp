// One token through a linear: the sum of the rows of weights that are asked for. Compiled once per instruction set.
// Does: read just those rows, in slices of 64 outputs, ahead of time; or, in int4, all of them in the order of memory.
// Does not: list them, or choose (linear.cpp).
#include "engine_kernels.hpp"
#include "engine_vectors.hpp"

namespace mar::MAR_VARIANT {
namespace {

// Rows that are worked on together, slice by slice, their sums in registers. What is read next is called into the
// first-level cache meanwhile: rows that are skipped break the hardware's own streams.
constexpr int kTogether = 8;
constexpr int kMostTogether = kGroup + kQuad;

inline const std::uint8_t* row_at(Block block, Rows rows, int r) {
  return block.rows + block.stride * static_cast<std::size_t>(rows.index ? rows.index[r] : r);
}

// Calls work(slice, rows, how many, the first one's place in the list) for every slice of each block of rows.
// end_of(start): where the block ends that starts there.
template <int Bytes, typename EndOf, typename Work>
inline void by_blocks(Block block, Rows rows, EndOf end_of, Work work) {
  const std::uint8_t* held[2][kMostTogether];
  const std::uint8_t **now = held[0], **next = held[1];
  auto fetch = [&](int start, const std::uint8_t** to) {
    const int count = start < rows.count ? end_of(start) - start : 0;
    for (int r = 0; r < count; ++r) to[r] = row_at(block, rows, start + r);
    return count;
  };
  int count = fetch(0, now);
  for (int start = 0; start < rows.count;) {
    const int after = fetch(start + count, next);
    for (int s = 0; s < block.slices; ++s) {
      for (int r = 0; r < after; ++r)
        for (int line = 0; line < Bytes; line += 64) __builtin_prefetch(next[r] + s * Bytes + line, 0, 3);
      work(s, now, count, start);
    }
    start += count;
    std::swap(now, next);
    count = after;
  }
}

template <int Bytes>
inline void rows_float(Block block, Rows rows, float* acc) {
  std::fill(acc, acc + block.slices * kSlice, 0.0f);
  const auto end_of = [&](int start) { return std::min(start + kTogether, rows.count); };
  by_blocks<Bytes * kSlice>(block, rows, end_of, [&](int s, const std::uint8_t* const* row, int count, int start) {
    float* to = acc + s * kSlice;
    F sums[kParts];
    for (int k = 0; k < kParts; ++k) sums[k] = load<F>(to + k * kLanes);
    for (int r = 0; r < count; ++r) {
      const F value = splat(rows.values[start + r]);
      const std::uint8_t* from = row[r] + s * kSlice * Bytes;
      for (int k = 0; k < kParts; ++k) {
        if constexpr (Bytes == 4)
          sums[k] += value * load<F>(from + k * kLanes * 4);
        else
          sums[k] += value * bf16_to_float(reinterpret_cast<const std::uint16_t*>(from + k * kLanes * 2));
      }
    }
    for (int k = 0; k < kParts; ++k) store(to + k * kLanes, sums[k]);
  });
}

// How far ahead a stream is called in, in bytes: the hardware's own calls end at a page, before what this takes to come.
constexpr int kAhead = 8192;

// Where a stream's pieces lie, and how many quads of inputs a group has.
constexpr int kLines = kQuad * kSlice;  // bytes of one quad of inputs and two slices

inline const std::uint8_t* lines_of(Stream stream, Piece piece, int pair) {
  return stream.weights + (static_cast<std::size_t>(piece.pair + pair) * stream.quads + piece.group * (kGroup / kQuad)) * kLines;
}
inline const std::uint16_t* scales_of(Stream stream, Piece piece, int pair) {
  return stream.scales + (static_cast<std::size_t>(piece.pair + pair) * stream.groups() + piece.group) * 2 * kSlice;
}
inline int quads_of(Stream stream, int group) { return std::min(kGroup / kQuad, stream.quads - group * (kGroup / kQuad)); }

}  // namespace

void rows_f32(Block block, Rows rows, float* acc) { rows_float<4>(block, rows, acc); }
void rows_bf16(Block block, Rows rows, float* acc) { rows_float<2>(block, rows, acc); }

#if defined(__AVX512VNNI__)

namespace {

inline __m512i four_codes(const std::int8_t* codes) {
  std::int32_t four;
  std::memcpy(&four, codes, 4);
  return _mm512_set1_epi32(four);
}

}  // namespace

void rows_i8(Block block, Rows rows, std::int32_t* acc) {
  std::fill(acc, acc + block.slices * kSlice, 0);
  const auto end_of = [&](int start) { return std::min(start + kTogether, rows.count); };
  by_blocks<kSlice>(block, rows, end_of, [&](int s, const std::uint8_t* const* row, int count, int start) {
    __m512i sums[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
    for (int r = 0; r < count; r += kQuad) {
      const std::size_t at = static_cast<std::size_t>(s) * kSlice;
      __m512i mixed[4];
      interleave(load<__m512i>(row[r] + at), load<__m512i>(row[r + 1] + at), load<__m512i>(row[r + 2] + at),
                 load<__m512i>(row[r + 3] + at), mixed);
      const __m512i codes = four_codes(rows.codes + start + r);
      for (int k = 0; k < 4; ++k) sums[k] = _mm512_dpbusd_epi32(sums[k], mixed[k], codes);
    }
    for (int k = 0; k < 4; ++k) {
      std::int32_t* to = acc + s * kSlice + k * kLanes;
      store(to, load<I>(to) + (I)sums[k]);
    }
  });
  for (int s = 0; s < block.slices; ++s) {
    std::int32_t* to = acc + s * kSlice;
    I ordered[4];
    in_order(load<I>(to), load<I>(to + kLanes), load<I>(to + 2 * kLanes), load<I>(to + 3 * kLanes), ordered);
    for (int k = 0; k < 4; ++k) store(to + k * kLanes, ordered[k]);
  }
}

// A byte holds a weight of each slice, in its low and high nibble. Bytes as they are give both sums at once, the high
// nibble's sixteen times; nibbles left high give that one alone.
void rows_i4(Block block, Rows rows, Groups groups, float* out) {
  const __m512i low_half = _mm512_set1_epi8(15), upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  std::fill(out, out + block.slices * kSlice, 0.0f);
  int at = 0;
  const auto end_of = [&](int start) { return groups.end_after(start); };
  by_blocks<kSlice>({block.rows, block.stride, block.slices / 2}, rows, end_of,
                    [&](int s, const std::uint8_t* const* row, int count, int start) {
    while (groups.ends[at] <= start) ++at;
    const std::size_t line = static_cast<std::size_t>(s) * kSlice;
    __m512i both[4], high[4];
    for (int k = 0; k < 4; ++k) {
      both[k] = _mm512_set1_epi32(-8 * 17 * groups.sums[at]);
      high[k] = _mm512_set1_epi32(-8 * 16 * groups.sums[at]);
    }
    for (int r = 0; r < count; r += kQuad) {
      __m512i mixed[4];
      interleave(load<__m512i>(row[r] + line), load<__m512i>(row[r + 1] + line), load<__m512i>(row[r + 2] + line),
                 load<__m512i>(row[r + 3] + line), mixed);
      const __m512i codes = four_codes(rows.codes + start + r);
      for (int k = 0; k < 4; ++k) {
        both[k] = _mm512_dpbusd_epi32(both[k], mixed[k], codes);
        high[k] = _mm512_dpbusd_epi32(high[k], _mm512_andnot_si512(low_half, mixed[k]), codes);
      }
    }
    const int group = (rows.index ? rows.index[start] : start) / kGroup;
    const std::uint16_t* scales = groups.scales + group * groups.scale_stride + 2 * s * kSlice;
    float* to = out + 2 * s * kSlice;
    for (int k = 0; k < 4; ++k, to += kLanes, scales += 2 * kLanes) {
      const __m512i pairs = load<__m512i>(scales);
      store(to, load<F>(to) + to_float((I)both[k] - (I)high[k]) * (F)_mm512_slli_epi32(pairs, 16));
      store(to + kSlice, load<F>(to + kSlice) + to_float((I)high[k]) * (F)_mm512_and_si512(pairs, upper));
    }
    if (s + 1 == block.slices / 2) ++at;
  });
  for (int s = 0; s < block.slices; ++s) {
    float* to = out + s * kSlice;
    F ordered[4];
    in_order(load<F>(to), load<F>(to + kLanes), load<F>(to + 2 * kLanes), load<F>(to + 3 * kLanes), ordered);
    for (int k = 0; k < 4; ++k) store(to + k * kLanes, s % 2 ? ordered[k] * 0.0625f : ordered[k]);
  }
}

void stream_i4(Stream stream, Piece piece, const std::int8_t* codes, const std::int32_t* sums, float* out) {
  const __m512i low_half = _mm512_set1_epi8(15);
  for (int pair = 0; pair < piece.pairs; ++pair, out += 2 * kSlice) {
    const std::uint8_t* line = lines_of(stream, piece, pair);
    const std::uint16_t* scales = scales_of(stream, piece, pair);
    F totals[8] = {};
    for (int group = 0; group < piece.groups; ++group, scales += 2 * kSlice) {
      __m512i sum[8];
      for (auto& one : sum) one = _mm512_setzero_si512();
      const std::int8_t* code = codes + group * kGroup;
      for (int quad = quads_of(stream, piece.group + group); quad > 0; --quad, line += kLines, code += kQuad) {
        const __m512i four = four_codes(code);
        for (int k = 0; k < 4; ++k) {
          __builtin_prefetch(line + k * 64 + kAhead, 0, 3);
          const __m512i both = load<__m512i>(line + k * 64);
          sum[k] = _mm512_dpbusd_epi32(sum[k], both, four);
          sum[4 + k] = _mm512_dpbusd_epi32(sum[4 + k], _mm512_andnot_si512(low_half, both), four);
        }
      }
      for (int k = 0; k < 8; ++k)
        totals[k] += to_float((k < 4 ? (I)sum[k] - (I)sum[4 + k] : (I)sum[k] >> 4) - 8 * sums[group]) *
                     bf16_to_float(scales + k * kLanes);
    }
    for (int k = 0; k < 8; ++k) store(out + k * kLanes, totals[k]);
  }
}

#else

void stream_i4(Stream stream, Piece piece, const std::int8_t* codes, const std::int32_t* sums, float* out) {
  std::fill(out, out + static_cast<std::ptrdiff_t>(piece.pairs) * 2 * kSlice, 0.0f);
  for (int pair = 0; pair < piece.pairs; ++pair, out += 2 * kSlice) {
    const std::uint8_t* lines = lines_of(stream, piece, pair);
    const std::uint16_t* scales = scales_of(stream, piece, pair);
    for (int group = 0; group < piece.groups; ++group, scales += 2 * kSlice) {
      const int quads = quads_of(stream, piece.group + group);
      const std::int8_t* code = codes + group * kGroup;
      // Eight outputs of both slices at a time: a group's lines stay in the first-level cache meanwhile.
      for (int at = 0; at < kSlice; at += 8) {
        std::int32_t low[8] = {}, high[8] = {};
#if defined(__AVX2__)
        __m256i low_sum = _mm256_setzero_si256(), high_sum = _mm256_setzero_si256();
        const __m256i low_half = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
        for (int quad = 0; quad < quads; ++quad) {
          std::int32_t four;
          std::memcpy(&four, code + quad * kQuad, 4);
          const __m256i times = _mm256_set1_epi32(four), both = load<__m256i>(lines + quad * kLines + at * kQuad);
          const __m256i first = _mm256_maddubs_epi16(_mm256_and_si256(both, low_half), times);
          const __m256i second = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(both, 4), low_half), times);
          low_sum = _mm256_add_epi32(low_sum, _mm256_madd_epi16(first, ones));
          high_sum = _mm256_add_epi32(high_sum, _mm256_madd_epi16(second, ones));
        }
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(low), low_sum);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(high), high_sum);
#else
        for (int quad = 0; quad < quads; ++quad) {
          const std::uint8_t* both = lines + quad * kLines + at * kQuad;
          for (int i = 0; i < 8 * kQuad; ++i) {
            low[i / kQuad] += (both[i] & 15) * code[quad * kQuad + i % kQuad];
            high[i / kQuad] += (both[i] >> 4) * code[quad * kQuad + i % kQuad];
          }
        }
#endif
        for (int j = 0; j < 8; ++j) {
          out[at + j] += static_cast<float>(low[j] - 8 * sums[group]) * bf16_to_float(scales[at + j]);
          out[kSlice + at + j] += static_cast<float>(high[j] - 8 * sums[group]) * bf16_to_float(scales[kSlice + at + j]);
        }
      }
      lines += quads * kLines;
    }
  }
}

namespace {

// 16 weights of one row, widened: of one slice, or of the low or high nibbles of two.
using Short16 = std::int16_t __attribute__((vector_size(32)));
using UByte16 = std::uint8_t __attribute__((vector_size(16)));
inline Short16 widen(const std::uint8_t* from) { return __builtin_convertvector(load<UByte16>(from), Short16); }

// Adds c0 w0 + c1 w1 to 16 sums.
inline void add_pair(Short16 w0, Short16 w1, std::int8_t c0, std::int8_t c1, std::int32_t* sums) {
#if defined(__AVX2__)
  const __m256i codes = _mm256_set1_epi32(static_cast<std::int32_t>(static_cast<std::uint32_t>(c1) << 16) |
                                          (static_cast<std::int32_t>(c0) & 0xffff));
  const __m256i low = _mm256_unpacklo_epi16((__m256i)w0, (__m256i)w1);
  const __m256i high = _mm256_unpackhi_epi16((__m256i)w0, (__m256i)w1);
  const __m256i first = _mm256_permute2x128_si256(low, high, 0x20);   // outputs 0-7
  const __m256i second = _mm256_permute2x128_si256(low, high, 0x31);  // outputs 8-15
  __m256i* to = reinterpret_cast<__m256i*>(sums);
  _mm256_storeu_si256(to, _mm256_add_epi32(_mm256_loadu_si256(to), _mm256_madd_epi16(first, codes)));
  _mm256_storeu_si256(to + 1, _mm256_add_epi32(_mm256_loadu_si256(to + 1), _mm256_madd_epi16(second, codes)));
#else
  for (int i = 0; i < 16; ++i)
    sums[i] += static_cast<std::int32_t>(w0[i]) * c0 + static_cast<std::int32_t>(w1[i]) * c1;
#endif
}

}  // namespace

void rows_i8(Block block, Rows rows, std::int32_t* acc) {
  std::fill(acc, acc + block.slices * kSlice, 0);
  const auto end_of = [&](int start) { return std::min(start + kTogether, rows.count); };
  by_blocks<kSlice>(block, rows, end_of, [&](int s, const std::uint8_t* const* row, int count, int start) {
    for (int r = 0; r < count; r += 2)
      for (int at = s * kSlice; at < (s + 1) * kSlice; at += 16)
        add_pair(widen(row[r] + at), widen(row[r + 1] + at), rows.codes[start + r], rows.codes[start + r + 1], acc + at);
  });
}

void rows_i4(Block block, Rows rows, Groups groups, float* out) {
  std::fill(out, out + block.slices * kSlice, 0.0f);
  int at = 0;
  const auto end_of = [&](int start) { return groups.end_after(start); };
  by_blocks<kSlice>({block.rows, block.stride, block.slices / 2}, rows, end_of,
                    [&](int s, const std::uint8_t* const* row, int count, int start) {
    std::int32_t sums[2 * kSlice] = {};
    for (int r = 0; r < count; r += 2)
      for (int part = 0; part < kSlice; part += 16) {
        const Short16 w0 = widen(row[r] + s * kSlice + part), w1 = widen(row[r + 1] + s * kSlice + part);
        const std::int8_t c0 = rows.codes[start + r], c1 = rows.codes[start + r + 1];
        add_pair(w0 & 15, w1 & 15, c0, c1, sums + part);
        add_pair(w0 >> 4, w1 >> 4, c0, c1, sums + part + kSlice);
      }
    while (groups.ends[at] <= start) ++at;
    const int group = (rows.index ? rows.index[start] : start) / kGroup;
    const std::uint16_t* scales = groups.scales + group * groups.scale_stride + 2 * s * kSlice;
    for (int j = 0; j < 2 * kSlice; ++j)
      out[2 * s * kSlice + j] += static_cast<float>(sums[j] - 8 * groups.sums[at]) * bf16_to_float(scales[scale_place(j)]);
    if (s + 1 == block.slices / 2) ++at;
  });
}

#endif

}  // namespace mar::MAR_VARIANT
