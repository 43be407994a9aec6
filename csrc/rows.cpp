// One token through a linear: the sum of the rows of weights that are asked for. Compiled once per instruction set.
// Does: read just those rows, ahead of time. Does not: list them, or read all of them in an order of their own (stream.cpp).
#include "avx2.hpp"
#include "engine_kernels.hpp"
#include "engine_vectors.hpp"

namespace mar::MAR_VARIANT {
namespace {

inline const std::uint8_t* row_at(Block block, Rows rows, int r) {
  return block.rows + block.stride * static_cast<std::size_t>(rows.index ? rows.index[r] : r);
}

// How far ahead rows are called in, in bytes, four rows at least, and into which cache: rows that are skipped break the
// hardware's own streams. Measured on a Zen 5; with AVX2 alone, rows of 1 KB and more on a Zen 3.
constexpr int kCalled = 8192;
#if defined(__AVX512VNNI__)
constexpr int kLevel = 3;
#else
constexpr int kLevel = 2;
#endif

// Rows go four by four along all of their slices, their sums in the first-level cache, and those further on are called in
// slice by slice meanwhile: many lines called at once, or rows in short pieces, took up to twice as long where memory is
// slow (docs/lab-log.md).
// Calls work(four rows, slice) for every slice, of Bytes bytes, of the listed rows from `at` on; beyond the last row it
// stands for those that are missing.
template <int Bytes, typename Work>
inline void by_slices(Block block, Rows rows, int at, int slices, Work work) {
  const int ahead = kQuad * std::max(1, kCalled / (kQuad * Bytes * slices));
  const std::uint8_t *row[kQuad], *next[kQuad];
  for (int r = 0; r < kQuad; ++r) {
    row[r] = row_at(block, rows, std::min(at + r, rows.count - 1));
    next[r] = row_at(block, rows, std::min(at + ahead + r, rows.count - 1));
  }
  for (int s = 0; s < slices; ++s) {
    for (int r = 0; r < kQuad; ++r)
      for (int line = 0; line < Bytes; line += 64) __builtin_prefetch(next[r] + s * Bytes + line, 0, kLevel);
    work(row, s);
  }
}

template <int Bytes>
inline void rows_float(Block block, Rows rows, float* acc) {
  std::fill(acc, acc + block.slices * kSlice, 0.0f);
  for (int at = 0; at < rows.count; at += kQuad) {
    const float* values = rows.values + at;
    const int count = std::min(kQuad, rows.count - at);
    by_slices<Bytes * kSlice>(block, rows, at, block.slices, [=](const std::uint8_t* const* row, int s) {
      float* to = acc + s * kSlice;
      F sums[kParts];
      for (int k = 0; k < kParts; ++k) sums[k] = load<F>(to + k * kLanes);
      for (int r = 0; r < count; ++r) {
        const F value = splat(values[r]);
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
}

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

// A line of four rows, byte beside byte.
inline void mix(const std::uint8_t* const* row, int line, __m512i mixed[4]) {
  const int at = line * kSlice;
  interleave(load<__m512i>(row[0] + at), load<__m512i>(row[1] + at), load<__m512i>(row[2] + at), load<__m512i>(row[3] + at), mixed);
}

}  // namespace

void rows_i8(Block block, Rows rows, std::int32_t* acc) {
  std::fill(acc, acc + block.slices * kSlice, 0);
  for (int at = 0; at < rows.count; at += kQuad) {
    const __m512i codes = four_codes(rows.codes + at);
    by_slices<kSlice>(block, rows, at, block.slices, [=](const std::uint8_t* const* row, int line) {
      __m512i mixed[4];
      mix(row, line, mixed);
      std::int32_t* to = acc + line * kSlice;
      for (int k = 0; k < 4; ++k, to += kLanes) store(to, _mm512_dpbusd_epi32(load<__m512i>(to), mixed[k], codes));
    });
  }
  for (int s = 0; s < block.slices; ++s) {
    std::int32_t* to = acc + s * kSlice;
    I ordered[4];
    in_order(load<I>(to), load<I>(to + kLanes), load<I>(to + 2 * kLanes), load<I>(to + 3 * kLanes), ordered);
    for (int k = 0; k < 4; ++k) store(to + k * kLanes, ordered[k]);
  }
}

namespace {

constexpr int kMostLines = 32;  // of rows in int4 that are worked on at once: a panel

// Sums of a line's bytes as they are, and of their high nibbles.
struct Sums {
  __m512i both[4], high[4];
};

// Of a group: what its sums start from, its scales, and how far it is to the next one's.
struct Run {
  __m512i less_both, less_high;
  const std::uint16_t* scales;
  std::size_t scale_stride;
};

// A byte holds a weight of each slice, in its low and high nibble. Bytes as they are give both sums at once, the high
// nibble's sixteen times; nibbles left high give that one alone. Sums begin with a group's First four rows and go to the
// outputs with its Last.
template <bool First, bool Last>
inline void four_i4(Block block, Rows rows, int at, const Run& run, Sums* sums, float* out) {
  const __m512i low_half = _mm512_set1_epi8(15), upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  const __m512i codes = four_codes(rows.codes + at);
  by_slices<kSlice>(block, rows, at, block.slices / 2, [=](const std::uint8_t* const* row, int line) {
    __m512i mixed[4];
    mix(row, line, mixed);
    Sums& sum = sums[line];
    const std::uint16_t* scales = run.scales + 2 * line * kSlice;
    float* to = out + 2 * line * kSlice;
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k, to += kLanes, scales += 2 * kLanes) {
      const __m512i both = _mm512_dpbusd_epi32(First ? run.less_both : sum.both[k], mixed[k], codes);
      const __m512i high =
          _mm512_dpbusd_epi32(First ? run.less_high : sum.high[k], _mm512_andnot_si512(low_half, mixed[k]), codes);
      if constexpr (!Last) {
        sum.both[k] = both;
        sum.high[k] = high;
        continue;
      }
      __builtin_prefetch(scales + run.scale_stride, 0, 3);  // the next group's
      const __m512i pairs = load<__m512i>(scales);
      store(to, load<F>(to) + to_float((I)both - (I)high) * (F)_mm512_slli_epi32(pairs, 16));
      store(to + kSlice, load<F>(to + kSlice) + to_float((I)high) * (F)_mm512_and_si512(pairs, upper));
    }
  });
}

}  // namespace

void rows_i4(Block block, Rows rows, Groups groups, float* out) {
  std::fill(out, out + block.slices * kSlice, 0.0f);
  Sums sums[kMostLines];
  for (int first = 0; first < block.slices / 2; first += kMostLines) {
    const Block part{block.rows + first * kSlice, block.stride, 2 * std::min(kMostLines, block.slices / 2 - first)};
    float* to = out + first * 2 * kSlice;
    for (int start = 0, at = 0; start < rows.count; start = groups.ends[at++]) {
      const int group = (rows.index ? rows.index[start] : start) / kGroup, less = -8 * groups.sums[at];
      const Run run{_mm512_set1_epi32(17 * less), _mm512_set1_epi32(16 * less),
                    groups.scales + group * groups.scale_stride + first * 2 * kSlice, groups.scale_stride};
      for (int r = start; r < groups.ends[at]; r += kQuad) {
        const bool last = r + kQuad == groups.ends[at];
        if (r == start)
          last ? four_i4<true, true>(part, rows, r, run, sums, to) : four_i4<true, false>(part, rows, r, run, sums, to);
        else
          last ? four_i4<false, true>(part, rows, r, run, sums, to) : four_i4<false, false>(part, rows, r, run, sums, to);
      }
    }
  }
  for (int s = 0; s < block.slices; ++s) {
    float* to = out + s * kSlice;
    F ordered[4];
    in_order(load<F>(to), load<F>(to + kLanes), load<F>(to + 2 * kLanes), load<F>(to + 3 * kLanes), ordered);
    for (int k = 0; k < 4; ++k) store(to + k * kLanes, s % 2 ? ordered[k] * 0.0625f : ordered[k]);
  }
}

#elif defined(__AVX2__)
// Bytes are multiplied and added two by two, to 16 bits (maddubs), and no two products may be more than these hold, where
// maddubs would stop. Codes lie in [-127, 127].
namespace {

constexpr int kBytes = 32;  // of a register

#if !defined(MAR_AVXVNNI)

// Four codes, each pair in halves where its products could be more than 16 bits hold.
struct Steps {
  std::int32_t codes[2];
  int count;
};
inline Steps steps_of(const std::int8_t* codes) {
  const auto size = [&](int r) { return std::abs(codes[r]) + std::abs(codes[r + 1]); };
  std::int8_t parts[2][kQuad];
  const int count = std::max(size(0), size(2)) > 128 ? 2 : 1;
  for (int r = 0; r < kQuad; ++r) {
    parts[0][r] = static_cast<std::int8_t>(codes[r] / count);
    parts[1][r] = static_cast<std::int8_t>(codes[r] - parts[0][r]);
  }
  Steps found{{}, count};
  std::memcpy(found.codes, parts, sizeof parts);
  return found;
}

#endif

}  // namespace

void rows_i8(Block block, Rows rows, std::int32_t* acc) {
  std::fill(acc, acc + block.slices * kSlice, 0);
  for (int at = 0; at < rows.count; at += kQuad) {
#if defined(MAR_AVXVNNI)
    const __m256i four = four_bytes(rows.codes + at);
#else
    const __m256i ones = _mm256_set1_epi16(1);
    const Steps steps = steps_of(rows.codes + at);
#endif
    by_slices<kSlice>(block, rows, at, block.slices, [&](const std::uint8_t* const* row, int line) {
      for (int half = 0; half < kSlice; half += kBytes) {
        __m256i from[kQuad];
        for (int r = 0; r < kQuad; ++r) from[r] = load<__m256i>(row[r] + line * kSlice + half);
        const __m256i a = _mm256_unpacklo_epi8(from[0], from[1]), b = _mm256_unpackhi_epi8(from[0], from[1]);
        const __m256i c = _mm256_unpacklo_epi8(from[2], from[3]), d = _mm256_unpackhi_epi8(from[2], from[3]);
        const __m256i mixed[4] = {_mm256_unpacklo_epi16(a, c), _mm256_unpackhi_epi16(a, c), _mm256_unpacklo_epi16(b, d),
                                  _mm256_unpackhi_epi16(b, d)};
        std::int32_t* to = acc + line * kSlice + half;
#if defined(MAR_AVXVNNI)
        for (int j = 0; j < 4; ++j) store(to + 8 * j, plus_dots(load<__m256i>(to + 8 * j), mixed[j], four));
#else
        for (int step = 0; step < steps.count; ++step) {
          const __m256i codes = _mm256_set1_epi32(steps.codes[step]);
          for (int j = 0; j < 4; ++j) {
            const __m256i product = _mm256_madd_epi16(_mm256_maddubs_epi16(mixed[j], codes), ones);
            store(to + 8 * j, _mm256_add_epi32(load<__m256i>(to + 8 * j), product));
          }
        }
#endif
      }
    });
  }
  // Vector j of 32 outputs has outputs 4 j and on of the first sixteen and of the last.
  for (int at = 0; at < block.slices * kSlice; at += kBytes) {
    __m256i v[4];
    for (int j = 0; j < 4; ++j) v[j] = load<__m256i>(acc + at + 8 * j);
    store(acc + at, _mm256_permute2x128_si256(v[0], v[1], 0x20));
    store(acc + at + 8, _mm256_permute2x128_si256(v[2], v[3], 0x20));
    store(acc + at + 16, _mm256_permute2x128_si256(v[0], v[1], 0x31));
    store(acc + at + 24, _mm256_permute2x128_si256(v[2], v[3], 0x31));
  }
}

namespace {

constexpr int kMostLines = 64;  // of rows in int4 that are worked on at once: a panel
// To 16-bit sums others are added modulo 2^16: one may pass through any value and is right if it ends within 16 bits.
// Nibbles less 8 are within 8: so are sums whose codes' sizes add up to 4,095 or less, and those of kRun rows.
constexpr int kMostSizes = 4095, kRun = 32;

// Sums of a line's two slices: of the first and second half of the one, then of the other, as unpacked registers have them.
struct ShortSums {
  std::int16_t of[2 * kSlice];
};

inline __m256i two_codes(const std::int8_t* codes) {
  std::int16_t two;
  std::memcpy(&two, codes, sizeof two);
  return _mm256_set1_epi16(two);
}

// A run: rows of one group, whose sums fit 16 bits; less: what its sums start from. More sums of the group, or null.
struct Run {
  __m256i less;
  const ShortSums* others;
  const std::uint16_t* scales;
  float* out;
};

inline __m128i of_lane(__m256i v, int lane) { return lane ? _mm256_extracti128_si256(v, 1) : _mm256_castsi256_si128(v); }

// Eight of a slice's sums, scaled, to `to` and on.
inline void add_scaled(__m128i sums, const std::int16_t* others, __m256i scale, float* to) {
  __m256i sum = _mm256_cvtepi16_epi32(sums);
  if (others) sum = _mm256_add_epi32(sum, _mm256_cvtepi16_epi32(load<__m128i>(others)));
  store(to, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_castsi256_ps(scale), load<__m256>(to)));
}

// Codes times nibbles less 8 of four rows. Sums begin with the First four and go to the outputs with the Last.
template <bool First, bool Last>
inline void four_i4(Block block, Rows rows, int at, const Run& run, ShortSums* sums) {
  const __m256i low_half = _mm256_set1_epi8(15), upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  const __m256i codes[2] = {two_codes(rows.codes + at), two_codes(rows.codes + at + 2)};
  by_slices<kSlice>(block, rows, at, block.slices / 2, [=](const std::uint8_t* const* row, int line) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      std::int16_t* place = sums[line].of + half * kBytes;  // two registers of the one slice, and kSlice on of the other
      __m256i sum[4];
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) sum[k] = First ? run.less : load<__m256i>(place + k / 2 * kSlice + k % 2 * 16);
#pragma GCC unroll 2
      for (int two = 0; two < 2; ++two) {
        const __m256i a = load<__m256i>(row[2 * two] + line * kSlice + half * kBytes);
        const __m256i b = load<__m256i>(row[2 * two + 1] + line * kSlice + half * kBytes);
        const __m256i mixed[2] = {_mm256_unpacklo_epi8(a, b), _mm256_unpackhi_epi8(a, b)};
#pragma GCC unroll 2
        for (int k = 0; k < 2; ++k) {
          const __m256i high = _mm256_and_si256(_mm256_srli_epi16(mixed[k], 4), low_half);
          sum[k] = plus_16(sum[k], _mm256_maddubs_epi16(_mm256_and_si256(mixed[k], low_half), codes[two]));
          sum[2 + k] = plus_16(sum[2 + k], _mm256_maddubs_epi16(high, codes[two]));
        }
      }
      if constexpr (!Last) {
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) store(place + k / 2 * kSlice + k % 2 * 16, sum[k]);
        continue;
      }
      // Register k has outputs 8 k and on of each slice's half, and those 16 further on.
#pragma GCC unroll 4
      for (int part = 0; part < 4; ++part) {
        const int k = part / 2, lane = part % 2, column = half * kBytes + k * 8 + lane * 16;
        const std::uint16_t* scales = run.scales + line * 2 * kSlice;
        const __m256i pairs = _mm256_inserti128_si256(_mm256_castsi128_si256(load<__m128i>(scales + scale_place(column))),
                                                      load<__m128i>(scales + scale_place(column + 4)), 1);
        const std::int16_t* others = run.others ? run.others[line].of + half * kBytes + k * 16 + lane * 8 : nullptr;
        float* to = run.out + line * 2 * kSlice + column;
        add_scaled(of_lane(sum[k], lane), others, _mm256_slli_epi32(pairs, 16), to);
        add_scaled(of_lane(sum[2 + k], lane), others ? others + kSlice : nullptr, _mm256_and_si256(pairs, upper), to + kSlice);
      }
    }
  });
}

// The listed rows [start, end): to the outputs, or to `sums`.
inline void run_i4(Block block, Rows rows, int start, int end, Run run, ShortSums* sums, bool out) {
  int total = 0;
  for (int r = start; r < end; ++r) total += rows.codes[r];
  run.less = _mm256_set1_epi16(static_cast<std::int16_t>(-8 * total));
  for (int at = start; at < end; at += kQuad) {
    const bool last = out && at + kQuad == end;
    if (at == start)
      last ? four_i4<true, true>(block, rows, at, run, sums) : four_i4<true, false>(block, rows, at, run, sums);
    else
      last ? four_i4<false, true>(block, rows, at, run, sums) : four_i4<false, false>(block, rows, at, run, sums);
  }
}

}  // namespace

void rows_i4(Block block, Rows rows, Groups groups, float* out) {
  std::fill(out, out + block.slices * kSlice, 0.0f);
  ShortSums sums[kMostLines], others[kMostLines];
  for (int first = 0; first < block.slices / 2; first += kMostLines) {
    const int lines = std::min(kMostLines, block.slices / 2 - first);
    const Block part{block.rows + first * kSlice, block.stride, 2 * lines};
    for (int start = 0, at = 0; start < rows.count; start = groups.ends[at++]) {
      const int end = groups.ends[at];
      int sizes = 0;
      for (int r = start; r < end; ++r) sizes += std::abs(rows.codes[r]);
      const int middle = sizes > kMostSizes && end - start > kRun ? start + kRun : start;
      const int group = (rows.index ? rows.index[start] : start) / kGroup;
      Run run{{}, nullptr, groups.scales + group * groups.scale_stride + first * 2 * kSlice, out + first * 2 * kSlice};
      if (middle > start) run_i4(part, rows, start, middle, run, others, false);
      if (middle > start) run.others = others;
      run_i4(part, rows, middle, end, run, sums, true);
    }
  }
}

#else

namespace {

// 16 weights of one row, widened: of one slice, or of the low or high nibbles of two.
using Short16 = std::int16_t __attribute__((vector_size(32)));
using UByte16 = std::uint8_t __attribute__((vector_size(16)));
inline Short16 widen(const std::uint8_t* from) { return __builtin_convertvector(load<UByte16>(from), Short16); }

// Adds c0 w0 + c1 w1 to 16 sums.
inline void add_pair(Short16 w0, Short16 w1, std::int8_t c0, std::int8_t c1, std::int32_t* sums) {
  for (int i = 0; i < 16; ++i)
    sums[i] += static_cast<std::int32_t>(w0[i]) * c0 + static_cast<std::int32_t>(w1[i]) * c1;
}

}  // namespace

void rows_i8(Block block, Rows rows, std::int32_t* acc) {
  std::fill(acc, acc + block.slices * kSlice, 0);
  for (int start = 0; start < rows.count; start += kQuad) {
    const std::int8_t* codes = rows.codes + start;
    by_slices<kSlice>(block, rows, start, block.slices, [=](const std::uint8_t* const* row, int s) {
      for (int r = 0; r < kQuad; r += 2)
        for (int at = s * kSlice; at < (s + 1) * kSlice; at += 16)
          add_pair(widen(row[r] + at), widen(row[r + 1] + at), codes[r], codes[r + 1], acc + at);
    });
  }
}

void rows_i4(Block block, Rows rows, Groups groups, float* out) {
  std::fill(out, out + block.slices * kSlice, 0.0f);
  constexpr int kMostLines = 32;  // of rows that are worked on at once
  std::int32_t sums[kMostLines * 2 * kSlice];
  for (int first = 0; first < block.slices / 2; first += kMostLines) {
    const int lines = std::min(kMostLines, block.slices / 2 - first), outputs = lines * 2 * kSlice;
    const Block part{block.rows + first * kSlice, block.stride, 2 * lines};
    float* to = out + first * 2 * kSlice;
    for (int start = 0, at = 0; start < rows.count; start = groups.ends[at++]) {
      std::fill(sums, sums + outputs, -8 * groups.sums[at]);
      for (int quad = start; quad < groups.ends[at]; quad += kQuad) {
        const std::int8_t* codes = rows.codes + quad;
        by_slices<kSlice>(part, rows, quad, lines, [=, &sums](const std::uint8_t* const* row, int line) {
          for (int r = 0; r < kQuad; r += 2)
            for (int i = 0; i < kSlice; i += 16) {
              const Short16 w0 = widen(row[r] + line * kSlice + i), w1 = widen(row[r + 1] + line * kSlice + i);
              std::int32_t* sum = sums + line * 2 * kSlice + i;
              add_pair(w0 & 15, w1 & 15, codes[r], codes[r + 1], sum);
              add_pair(w0 >> 4, w1 >> 4, codes[r], codes[r + 1], sum + kSlice);
            }
        });
      }
      const int group = (rows.index ? rows.index[start] : start) / kGroup;
      const std::uint16_t* scales = groups.scales + group * groups.scale_stride + first * 2 * kSlice;
      for (int j = 0; j < outputs; ++j) {
        const int line = j / (2 * kSlice) * 2 * kSlice;
        to[j] += static_cast<float>(sums[j]) * bf16_to_float(scales[line + scale_place(j - line)]);
      }
    }
  }
}

#endif

}  // namespace mar::MAR_VARIANT
