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

// How the next block of rows is called in while one is worked on: of all of its rows the lines that are one slice further
// on, or row by row along their lines. With AVX-512, on CPUs of two makers, lines into the first-level cache were fastest. On
// Zen 3 the second-level cache was, and rows where there are many (in int4 a group) or none is skipped.
#if defined(__AVX512VNNI__)
constexpr int kLevel = 3;
inline bool call_along(Block, const std::uint8_t* const*, int) { return false; }
#else
constexpr int kLevel = 2;
inline bool call_along(Block block, const std::uint8_t* const* rows, int count) {
  return count > kTogether || (count > 1 && rows[count - 1] - rows[0] == static_cast<std::ptrdiff_t>(block.stride) * (count - 1));
}
#endif

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
    const bool along = call_along(block, next, after);
    for (int s = 0; s < block.slices; ++s) {
      if (along) {
        for (int r = after * s / block.slices; r < after * (s + 1) / block.slices; ++r)
          for (int line = 0; line < block.slices * Bytes; line += 64) __builtin_prefetch(next[r] + line, 0, kLevel);
      } else {
        for (int r = 0; r < after; ++r)
          for (int line = 0; line < Bytes; line += 64) __builtin_prefetch(next[r] + s * Bytes + line, 0, kLevel);
      }
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

#elif defined(__AVX2__)

// Bytes are multiplied and added two by two, to 16 bits (maddubs); to these sums others are added modulo 2^16. So a sum may
// pass through any value and is right if it ends within 16 bits. Each kernel says why it does, and why no two products
// are more than 16 bits hold, where maddubs would stop. Codes lie in [-127, 127].
namespace {

constexpr int kBytes = 32;  // of a register

inline __m256i two_codes(const void* codes) {
  std::int16_t two;
  std::memcpy(&two, codes, 2);
  return _mm256_set1_epi16(two);
}

inline int sum_of(const std::int8_t* codes, int count) {
  int total = 0;
  for (int r = 0; r < count; ++r) total += codes[r];
  return total;
}

// Of 16-bit numbers, eight.
inline __m256i widened(const std::int16_t* from) { return _mm256_cvtepi16_epi32(load<__m128i>(from)); }

// Where the unpacked halves of registers of rows leave output 8 j of a slice.
constexpr int unpacked_place(int j) { return j / 4 * 32 + j % 2 * 16 + j % 4 / 2 * 8; }

// The steps of up to kTogether listed rows in int8: two rows, and what they are multiplied by; in runs.
struct Steps {
  struct Step {
    int row;
    std::int8_t codes[2];
  };
  Step steps[kTogether];
  int ends[kTogether / 2];  // of runs
  int sums[kTogether / 2];  // of their codes
  int count = 0, runs = 0;
};

// Two products of bytes up to 255 fit 16 bits where their codes' sizes add up to 128 or less: larger codes are multiplied in
// two halves. Less 128, as they stand for, weights are within 128: a run's sum is where its codes' sizes add up to 255 or less.
inline Steps steps_of(const std::int8_t* codes, int count) {
  Steps found;
  int size = 256, sum = 0;
  for (int r = 0; r < count; r += 2) {
    const int first = codes[r], second = codes[r + 1], here = std::abs(first) + std::abs(second);
    if (size + here > 255) {
      ++found.runs;
      size = sum = 0;
    }
    size += here;
    sum += first + second;
    const bool halved = here > 128;
    const int half[2] = {halved ? first / 2 : 0, halved ? second / 2 : 0};
    if (halved) found.steps[found.count++] = {r, {static_cast<std::int8_t>(half[0]), static_cast<std::int8_t>(half[1])}};
    found.steps[found.count++] = {r, {static_cast<std::int8_t>(first - half[0]), static_cast<std::int8_t>(second - half[1])}};
    found.ends[found.runs - 1] = found.count;
    found.sums[found.runs - 1] = sum;
  }
  return found;
}

}  // namespace

void rows_i8(Block block, Rows rows, std::int32_t* acc) {
  std::fill(acc, acc + block.slices * kSlice, 128 * sum_of(rows.codes, rows.count));
  Steps steps;
  const auto end_of = [&](int start) { return std::min(start + kTogether, rows.count); };
  by_blocks<kSlice>(block, rows, end_of, [&](int s, const std::uint8_t* const* row, int count, int start) {
    if (s == 0) steps = steps_of(rows.codes + start, count);
    const std::size_t at = static_cast<std::size_t>(s) * kSlice;
    std::int32_t* to = acc + at;
    for (int run = 0, step = 0; run < steps.runs; ++run) {
      __m256i sums[4];
      for (auto& one : sums) one = _mm256_set1_epi16(static_cast<std::int16_t>(-128 * steps.sums[run]));
      for (; step < steps.ends[run]; ++step) {
        const std::uint8_t* const* two = row + steps.steps[step].row;
        const __m256i codes = two_codes(steps.steps[step].codes);
        for (int h = 0; h < 2; ++h) {
          const __m256i a = load<__m256i>(two[0] + at + h * kBytes), b = load<__m256i>(two[1] + at + h * kBytes);
          sums[2 * h] = _mm256_add_epi16(sums[2 * h], _mm256_maddubs_epi16(_mm256_unpacklo_epi8(a, b), codes));
          sums[2 * h + 1] = _mm256_add_epi16(sums[2 * h + 1], _mm256_maddubs_epi16(_mm256_unpackhi_epi8(a, b), codes));
        }
      }
      std::int16_t short_sums[kSlice];
      for (int k = 0; k < 4; ++k) store(short_sums + k * 16, sums[k]);
      for (int j = 0; j < 8; ++j)
        store(to + 8 * j, _mm256_add_epi32(load<__m256i>(to + 8 * j), widened(short_sums + unpacked_place(j))));
    }
  });
}

namespace {

constexpr int kRun = 32;  // rows in int4: nibbles less 8 are within 8, and 32 times 8 times 127 is 32,512

// Sums of two slices, the first slice's at unpacked_place, the second's after them.
struct ShortSums {
  std::int16_t of[2 * kSlice];
};

inline __m256i plus_products(__m256i sums, __m256i nibbles, __m256i codes) {
  return _mm256_add_epi16(sums, _mm256_maddubs_epi16(nibbles, codes));
}

// Sums of the low and high nibbles of 32 bytes of rows, of their unpacked halves. By value, in fours: GCC 12 keeps all
// eight in registers only so.
struct Nibbles {
  __m256i low0, low1, high0, high1;
};

inline Nibbles plus_rows(Nibbles sums, __m256i first, __m256i second, __m256i codes) {
  const __m256i low_half = _mm256_set1_epi8(15);
  const __m256i mixed0 = _mm256_unpacklo_epi8(first, second);
  sums.low0 = plus_products(sums.low0, _mm256_and_si256(mixed0, low_half), codes);
  sums.high0 = plus_products(sums.high0, _mm256_and_si256(_mm256_srli_epi16(mixed0, 4), low_half), codes);
  const __m256i mixed1 = _mm256_unpackhi_epi8(first, second);
  sums.low1 = plus_products(sums.low1, _mm256_and_si256(mixed1, low_half), codes);
  sums.high1 = plus_products(sums.high1, _mm256_and_si256(_mm256_srli_epi16(mixed1, 4), low_half), codes);
  return sums;
}

// Up to kRun rows' codes times nibbles less 8; sum: of the codes.
inline ShortSums run_of(const std::uint8_t* const* row, const std::int8_t* codes, int count, int sum, std::size_t line) {
  const __m256i start = _mm256_set1_epi16(static_cast<std::int16_t>(-8 * sum));
  Nibbles front{start, start, start, start}, back = front;
  for (int r = 0; r < count; r += 2) {
    const __m256i two = two_codes(codes + r);
    const std::uint8_t *first = row[r] + line, *second = row[r + 1] + line;
    front = plus_rows(front, load<__m256i>(first), load<__m256i>(second), two);
    back = plus_rows(back, load<__m256i>(first + kBytes), load<__m256i>(second + kBytes), two);
  }
  const __m256i sums[8] = {front.low0, front.low1, back.low0, back.low1, front.high0, front.high1, back.high0, back.high1};
  ShortSums found;
  for (int k = 0; k < 8; ++k) store(found.of + k * 16, sums[k]);
  return found;
}

inline void add_scaled(__m256i sum, __m256i scale, float* to) {
  store(to, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_castsi256_ps(scale), load<__m256>(to)));
}

template <int Runs>
inline void add_runs(const ShortSums* runs, const std::uint16_t* scales, float* to) {
  const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) {
    const int place = unpacked_place(j);
    __m256i low = widened(runs[0].of + place), high = widened(runs[0].of + kSlice + place);
    if constexpr (Runs == 2) {
      low = _mm256_add_epi32(low, widened(runs[1].of + place));
      high = _mm256_add_epi32(high, widened(runs[1].of + kSlice + place));
    }
    const __m256i pairs = _mm256_inserti128_si256(_mm256_castsi128_si256(load<__m128i>(scales + scale_place(8 * j))),
                                                  load<__m128i>(scales + scale_place(8 * j + 4)), 1);
    add_scaled(low, _mm256_slli_epi32(pairs, 16), to + 8 * j);
    add_scaled(high, _mm256_and_si256(pairs, upper), to + kSlice + 8 * j);
  }
}

}  // namespace

void rows_i4(Block block, Rows rows, Groups groups, float* out) {
  std::fill(out, out + block.slices * kSlice, 0.0f);
  int first_sum = 0, second_sum = 0;
  const auto end_of = [&](int start) { return groups.end_after(start); };
  by_blocks<kSlice>({block.rows, block.stride, block.slices / 2}, rows, end_of,
                    [&](int s, const std::uint8_t* const* row, int count, int start) {
    const std::int8_t* codes = rows.codes + start;
    if (s == 0) {
      first_sum = sum_of(codes, std::min(count, kRun));
      second_sum = count > kRun ? sum_of(codes + kRun, count - kRun) : 0;
    }
    const std::size_t line = static_cast<std::size_t>(s) * kSlice;
    const int group = (rows.index ? rows.index[start] : start) / kGroup;
    const std::uint16_t* scales = groups.scales + group * groups.scale_stride + 2 * s * kSlice;
    ShortSums runs[2];
    runs[0] = run_of(row, codes, std::min(count, kRun), first_sum, line);
    if (count <= kRun) return add_runs<1>(runs, scales, out + 2 * s * kSlice);
    runs[1] = run_of(row + kRun, codes + kRun, count - kRun, second_sum, line);
    add_runs<2>(runs, scales, out + 2 * s * kSlice);
  });
}

namespace {

// Codes of a group times 8, to take away: of each register's 16-bit numbers, in turn those of the first two and of the last
// two inputs of all quads.
inline __m256i eights_of(const std::int8_t* codes) {
  const __m256i eight = _mm256_set1_epi8(8);
  __m256i sum = _mm256_add_epi16(_mm256_maddubs_epi16(eight, load<__m256i>(codes)),
                                 _mm256_maddubs_epi16(eight, load<__m256i>(codes + kBytes)));
  sum = _mm256_add_epi16(sum, _mm256_permute2x128_si256(sum, sum, 1));
  sum = _mm256_add_epi16(sum, _mm256_shuffle_epi32(sum, 0x4e));
  return _mm256_add_epi16(sum, _mm256_shuffle_epi32(sum, 0xb1));
}

}  // namespace

// A sum takes 32 of a group's inputs, and a nibble less 8 is within 8: with codes of 127 that is 32,512.
void stream_i4(Stream stream, Piece piece, const std::int8_t* codes, const std::int32_t*, float* out) {
  const __m256i low_half = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  std::fill(out, out + static_cast<std::ptrdiff_t>(piece.pairs) * 2 * kSlice, 0.0f);
  for (int pair = 0; pair < piece.pairs; ++pair, out += 2 * kSlice) {
    const std::uint8_t* lines = lines_of(stream, piece, pair);
    const std::uint16_t* scales = scales_of(stream, piece, pair);
    for (int group = 0; group < piece.groups; ++group, scales += 2 * kSlice) {
      const int quads = quads_of(stream, piece.group + group);
      const std::int8_t* code = codes + group * kGroup;
      const __m256i start = _mm256_sub_epi16(_mm256_setzero_si256(), eights_of(code));
      // Half of the outputs at a time, whose eight sums stay in registers.
      for (int half = 0; half < 2; ++half) {
        const std::uint8_t* line = lines + half * kLines / 2;
        __m256i sums[8];
        for (auto& one : sums) one = start;
        for (int quad = 0; quad < quads; ++quad, line += kLines) {
          std::int32_t four;
          std::memcpy(&four, code + quad * kQuad, 4);
          const __m256i times = _mm256_set1_epi32(four);
          for (int k = 0; k < 4; ++k) {
            if (k % 2 == 0) __builtin_prefetch(line + k * kBytes + kAhead, 0, 3);
            const __m256i both = load<__m256i>(line + k * kBytes);
            sums[k] = _mm256_add_epi16(sums[k], _mm256_maddubs_epi16(_mm256_and_si256(both, low_half), times));
            sums[4 + k] = _mm256_add_epi16(
                sums[4 + k], _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(both, 4), low_half), times));
          }
        }
        for (int k = 0; k < 8; ++k) {
          const int at = k / 4 * kSlice + half * kSlice / 2 + k % 4 * 8;
          const __m256i scale = _mm256_slli_epi32(_mm256_cvtepu16_epi32(load<__m128i>(scales + at)), 16);
          add_scaled(_mm256_madd_epi16(sums[k], ones), scale, out + at);
        }
      }
      lines += quads * kLines;
    }
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
        for (int quad = 0; quad < quads; ++quad) {
          const std::uint8_t* both = lines + quad * kLines + at * kQuad;
          for (int i = 0; i < 8 * kQuad; ++i) {
            low[i / kQuad] += (both[i] & 15) * code[quad * kQuad + i % kQuad];
            high[i / kQuad] += (both[i] >> 4) * code[quad * kQuad + i % kQuad];
          }
        }
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
  for (int i = 0; i < 16; ++i)
    sums[i] += static_cast<std::int32_t>(w0[i]) * c0 + static_cast<std::int32_t>(w1[i]) * c1;
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
