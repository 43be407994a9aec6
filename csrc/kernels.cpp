// The engine's inner loops, compiled once per instruction set (MAR_VARIANT). Vector types carry most of it to every set;
// only the integer products are written by hand for AVX2 and AVX-512.
#include "kernels.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace mar {
namespace MAR_VARIANT {
namespace {

using F = float __attribute__((vector_size(64)));
using I = std::int32_t __attribute__((vector_size(64)));
constexpr int kLanes = 16;

template <typename V>
inline V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
template <typename V>
inline void store(void* to, V v) {
  std::memcpy(to, &v, sizeof v);
}
inline F splat(float x) { return F{} + x; }
inline F load_some(const float* from, int n) {
  F v{};
  std::memcpy(&v, from, sizeof(float) * n);
  return v;
}
inline F least(F a, F b) { return a < b ? a : b; }
inline F most(F a, F b) { return a > b ? a : b; }
inline float sum(F v) {
  float s = 0;
  for (int i = 0; i < kLanes; ++i) s += v[i];
  return s;
}
inline F magnitude(F v) { return reinterpret_cast<F>(reinterpret_cast<I>(v) & 0x7fffffff); }
inline I to_int(F v) { return __builtin_convertvector(v, I); }
inline F to_float(I v) { return __builtin_convertvector(v, F); }
// To the nearest, ties to even; right for |v| < 2^22.
inline F nearest(F v) { return (v + 12582912.0f) - 12582912.0f; }

// Within 2 ulp of exp; the argument is clamped to where the result is a normal number.
inline F exponential(F x) {
  x = most(least(x, splat(88.0f)), splat(-87.0f));
  const F n = nearest(x * 1.44269504088896341f);
  F r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  F p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return p * reinterpret_cast<F>((to_int(n) + 127) << 23);
}
inline F silu(F x) { return x / (1.0f + exponential(-x)); }

inline F bf16_to_float(const std::uint16_t* from) {
  using U = std::uint16_t __attribute__((vector_size(32)));
  using W = std::uint32_t __attribute__((vector_size(64)));
  return reinterpret_cast<F>(__builtin_convertvector(load<U>(from), W) << 16);
}
inline float bf16_to_float(std::uint16_t x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

void rms_norm(const float* x, const float* weight, float eps, int n, float* y) {
  F squares{};
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const F v = load<F>(x + i);
    squares += v * v;
  }
  float total = sum(squares);
  for (; i < n; ++i) total += x[i] * x[i];
  const float factor = 1.0f / std::sqrt(total / n + eps);
  for (i = 0; i + kLanes <= n; i += kLanes) store(y + i, load<F>(x + i) * factor * load<F>(weight + i));
  for (; i < n; ++i) y[i] = x[i] * factor * weight[i];
}

inline I codes_of(F x, F divisor, Encoder encoder) {
  // Clamped one beyond the codes first, so that both conversions stay in their range.
  const F v = least(most(x / divisor, splat(encoder.low - 1.0f)), splat(encoder.high + 1.0f));
  const I code = encoder.round ? to_int(nearest(v)) : to_int(v);
  const I low = I{} + encoder.low, high = I{} + encoder.high;
  const I raised = code < low ? low : code;
  return raised > high ? high : raised;
}

using Bytes16 = std::int8_t __attribute__((vector_size(16)));

void encode(const float* x, const float* divisor, int n, Encoder encoder, std::int8_t* codes) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes)
    store(codes + i, __builtin_convertvector(codes_of(load<F>(x + i), load<F>(divisor + i), encoder), Bytes16));
  if (i < n) {
    const I code = codes_of(load_some(x + i, n - i), load_some(divisor + i, n - i), encoder);
    for (int j = 0; i + j < n; ++j) codes[i + j] = static_cast<std::int8_t>(code[j]);
  }
}

float quantise(const float* x, int n, std::int8_t* codes) {
  F peaks{};
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) peaks = most(peaks, magnitude(load<F>(x + i)));
  float peak = 0;
  for (int lane = 0; lane < kLanes; ++lane) peak = std::max(peak, peaks[lane]);
  for (; i < n; ++i) peak = std::max(peak, std::fabs(x[i]));
  const float scale = peak / 127.0f;
  const float factor = peak > 1e-36f ? 127.0f / peak : 0.0f;  // what is smaller has no inverse
  for (i = 0; i + kLanes <= n; i += kLanes)
    store(codes + i, __builtin_convertvector(to_int(nearest(load<F>(x + i) * factor)), Bytes16));
  for (; i < n; ++i) codes[i] = static_cast<std::int8_t>(std::nearbyint(x[i] * factor));
  return scale;
}

float dot(const float* x, const float* y, int n) {
  F total{};
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) total += load<F>(x + i) * load<F>(y + i);
  float rest = sum(total);
  for (; i < n; ++i) rest += x[i] * y[i];
  return rest;
}

void add(const float* x, int n, float* y) {
  for (int i = 0; i < n; ++i) y[i] += x[i];
}

void gated(const float* gate, const float* up, int n, float* y) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, silu(load<F>(gate + i)) * load<F>(up + i));
  if (i < n) {
    const F v = silu(load_some(gate + i, n - i)) * load_some(up + i, n - i);
    for (int j = 0; i + j < n; ++j) y[i + j] = v[j];
  }
}

// ---- single token: the rows that are asked for ----

// Rows that are worked on together, slice by slice, their sums in registers. What is read next is called into the
// second-level cache meanwhile: rows that are skipped break the hardware's own streams.
constexpr int kTogether = 16;
constexpr int kMostTogether = kGroup + kQuad;

inline const std::uint8_t* row_at(Block block, Rows rows, int r) {
  return block.rows + block.stride * static_cast<std::size_t>(rows.index ? rows.index[r] : r);
}

// Calls work(slice, rows, how many, the first one's place in the list) for every slice of each block of rows.
// end_of(start): where the block ends that starts there.
template <int Bytes, typename EndOf, typename Work>
inline void by_blocks(Block block, Rows rows, EndOf end_of, Work work) {
  const std::uint8_t *now[kMostTogether], *next[kMostTogether];
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
        for (int line = 0; line < Bytes; line += 64) __builtin_prefetch(next[r] + s * Bytes + line, 0, 2);
      work(s, now, count, start);
    }
    start += count;
    std::copy(next, next + after, now);
    count = after;
  }
}

template <int Bytes>
inline void rows_float(Block block, Rows rows, float* acc) {
  std::fill(acc, acc + block.slices * kSlice, 0.0f);
  const auto end_of = [&](int start) { return std::min(start + kTogether / 2, rows.count); };
  by_blocks<Bytes * kSlice>(block, rows, end_of, [&](int s, const std::uint8_t* const* row, int count, int start) {
    float* to = acc + s * kSlice;
    F sums[4];
    for (int k = 0; k < 4; ++k) sums[k] = load<F>(to + k * kLanes);
    for (int r = 0; r < count; ++r) {
      const F value = splat(rows.values[start + r]);
      const std::uint8_t* from = row[r] + s * kSlice * Bytes;
      for (int k = 0; k < 4; ++k) {
        if constexpr (Bytes == 4)
          sums[k] += value * load<F>(from + k * 64);
        else
          sums[k] += value * bf16_to_float(reinterpret_cast<const std::uint16_t*>(from + k * 32));
      }
    }
    for (int k = 0; k < 4; ++k) store(to + k * kLanes, sums[k]);
  });
}

void rows_f32(Block block, Rows rows, float* acc) { rows_float<4>(block, rows, acc); }
void rows_bf16(Block block, Rows rows, float* acc) { rows_float<2>(block, rows, acc); }

#if defined(__AVX512VNNI__)

// Four rows of 64 bytes to four registers, each 16 outputs of four consecutive bytes: register k, lane l, element e is
// output 16 l + 4 k + e.
inline void interleave(__m512i r0, __m512i r1, __m512i r2, __m512i r3, __m512i out[4]) {
  const __m512i a = _mm512_unpacklo_epi8(r0, r1), b = _mm512_unpackhi_epi8(r0, r1);
  const __m512i c = _mm512_unpacklo_epi8(r2, r3), d = _mm512_unpackhi_epi8(r2, r3);
  out[0] = _mm512_unpacklo_epi16(a, c);
  out[1] = _mm512_unpackhi_epi16(a, c);
  out[2] = _mm512_unpacklo_epi16(b, d);
  out[3] = _mm512_unpackhi_epi16(b, d);
}

// Undoes that order: a 4 x 4 transpose of 128-bit lanes.
template <typename V>
inline void in_order(V v0, V v1, V v2, V v3, V out[4]) {
  const __m512i a0 = (__m512i)v0, a1 = (__m512i)v1, a2 = (__m512i)v2, a3 = (__m512i)v3;
  const __m512i b0 = _mm512_shuffle_i32x4(a0, a1, 0x44), b1 = _mm512_shuffle_i32x4(a0, a1, 0xee);
  const __m512i b2 = _mm512_shuffle_i32x4(a2, a3, 0x44), b3 = _mm512_shuffle_i32x4(a2, a3, 0xee);
  out[0] = (V)_mm512_shuffle_i32x4(b0, b2, 0x88);
  out[1] = (V)_mm512_shuffle_i32x4(b0, b2, 0xdd);
  out[2] = (V)_mm512_shuffle_i32x4(b1, b3, 0x88);
  out[3] = (V)_mm512_shuffle_i32x4(b1, b3, 0xdd);
}

inline __m512i four_codes(const std::int8_t* codes) {
  std::int32_t four;
  std::memcpy(&four, codes, 4);
  return _mm512_set1_epi32(four);
}

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
    __m512i out[4];
    in_order(sums[0], sums[1], sums[2], sums[3], out);
    for (int k = 0; k < 4; ++k) {
      std::int32_t* to = acc + s * kSlice + k * kLanes;
      store(to, load<I>(to) + (I)out[k]);
    }
  });
}

void rows_i4(Block block, Rows rows, Groups groups, float* out) {
  const __m512i low_half = _mm512_set1_epi8(15);
  std::fill(out, out + block.slices * kSlice, 0.0f);
  int at = 0;
  const auto end_of = [&](int start) { return groups.end_after(start); };
  by_blocks<kSlice>({block.rows, block.stride, block.slices / 2}, rows, end_of,
                    [&](int s, const std::uint8_t* const* row, int count, int start) {
    __m512i low[4], high[4];
    for (int k = 0; k < 4; ++k) low[k] = high[k] = _mm512_setzero_si512();
    for (int r = 0; r < count; r += kQuad) {
      const std::size_t line = static_cast<std::size_t>(s) * kSlice;
      __m512i mixed[4];
      interleave(load<__m512i>(row[r] + line), load<__m512i>(row[r + 1] + line), load<__m512i>(row[r + 2] + line),
                 load<__m512i>(row[r + 3] + line), mixed);
      const __m512i codes = four_codes(rows.codes + start + r);
      for (int k = 0; k < 4; ++k) {
        low[k] = _mm512_dpbusd_epi32(low[k], _mm512_and_si512(mixed[k], low_half), codes);
        // High nibbles are left where they are, sixteen times too large.
        high[k] = _mm512_dpbusd_epi32(high[k], _mm512_andnot_si512(low_half, mixed[k]), codes);
      }
    }
    while (groups.ends[at] <= start) ++at;
    const int group = (rows.index ? rows.index[start] : start) / kGroup;
    const std::uint16_t* scales = groups.scales + group * groups.scale_stride + 2 * s * kSlice;
    float* to = out + 2 * s * kSlice;
    __m512i ordered[4];
    in_order(low[0], low[1], low[2], low[3], ordered);
    for (int k = 0; k < 4; ++k, to += kLanes, scales += kLanes)
      store(to, load<F>(to) + to_float((I)ordered[k] - 8 * groups.sums[at]) * bf16_to_float(scales));
    in_order(high[0], high[1], high[2], high[3], ordered);
    for (int k = 0; k < 4; ++k, to += kLanes, scales += kLanes)
      store(to, load<F>(to) + to_float(((I)ordered[k] >> 4) - 8 * groups.sums[at]) * bf16_to_float(scales));
    if (s + 1 == block.slices / 2) ++at;
  });
}

#else

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
      out[2 * s * kSlice + j] += static_cast<float>(sums[j] - 8 * groups.sums[at]) * bf16_to_float(scales[j]);
    if (s + 1 == block.slices / 2) ++at;
  });
}

#endif

// ---- many tokens ----

// out (m x 64) = a (m x k) times b (k x 64), or plus; for up to M rows of a.
template <int M>
inline void tile_float(const float* a, std::size_t a_stride, const float* b, std::size_t b_stride, int k, float* out,
                       std::size_t out_stride, bool plus) {
  F sums[M][4];
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < 4; ++v) sums[m][v] = plus ? load<F>(out + m * out_stride + v * kLanes) : F{};
  for (int i = 0; i < k; ++i) {
    F w[4];
    for (int v = 0; v < 4; ++v) w[v] = load<F>(b + i * b_stride + v * kLanes);
    for (int m = 0; m < M; ++m) {
      const F x = splat(a[m * a_stride + i]);
      for (int v = 0; v < 4; ++v) sums[m][v] += x * w[v];
    }
  }
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < 4; ++v) store(out + m * out_stride + v * kLanes, sums[m][v]);
}

// Calls tile<M> over `tokens` rows, the widest tile first.
#define MAR_TILES(widest, call)        \
  for (int m = 0; m < tokens;) {       \
    const int left = tokens - m;       \
    if (left >= widest) {              \
      call(widest);                    \
      m += widest;                     \
    } else if (left >= 2) {            \
      call(2);                         \
      m += 2;                          \
    } else {                           \
      call(1);                         \
      m += 1;                          \
    }                                  \
  }

inline void product(const float* a, std::size_t a_stride, const float* b, std::size_t b_stride, int k, int tokens,
                    float* out, std::size_t out_stride, bool plus) {
#define MAR_CALL(M) tile_float<M>(a + m * a_stride, a_stride, b, b_stride, k, out + m * out_stride, out_stride, plus)
  MAR_TILES(6, MAR_CALL)
#undef MAR_CALL
}

void block_f32(Block block, int inputs, const float* values, int tokens, float* out, std::size_t out_stride,
               std::uint8_t*) {
  const float* weights = reinterpret_cast<const float*>(block.rows);
  for (int s = 0; s < block.slices; ++s)
    product(values, inputs, weights + s * kSlice, block.stride / 4, inputs, tokens, out + s * kSlice, out_stride, false);
}

#if defined(__AVX512BF16__)

template <int M>
inline void tile_bf16(const std::uint16_t* a, std::size_t a_stride, const std::uint8_t* w, int pairs, float* out,
                      std::size_t out_stride) {
  F sums[M][4] = {};
  for (int i = 0; i < pairs; ++i) {
    __m512bh b[4];
    for (int v = 0; v < 4; ++v) b[v] = (__m512bh)load<__m512i>(w + (i * 4 + v) * 64);
    for (int m = 0; m < M; ++m) {
      std::int32_t two;
      std::memcpy(&two, a + m * a_stride + 2 * i, 4);
      const __m512bh x = (__m512bh)_mm512_set1_epi32(two);
      for (int v = 0; v < 4; ++v) sums[m][v] = (F)_mm512_dpbf16_ps((__m512)sums[m][v], b[v], x);
    }
  }
  // Pairs were made by unpacking: register v = 2 h + u, lane l, element e is output 32 h + 8 l + 4 u + e.
  for (int m = 0; m < M; ++m)
    for (int h = 0; h < 2; ++h) {
      const __m512 u = (__m512)sums[m][2 * h], v = (__m512)sums[m][2 * h + 1];
      const __m512 a0 = _mm512_shuffle_f32x4(u, v, 0x44), a1 = _mm512_shuffle_f32x4(u, v, 0xee);
      float* to = out + m * out_stride + 32 * h;
      store(to, _mm512_shuffle_f32x4(a0, a0, 0xd8));
      store(to + kLanes, _mm512_shuffle_f32x4(a1, a1, 0xd8));
    }
}

void block_bf16(Block block, int inputs, const float* values, int tokens, float* out, std::size_t out_stride,
                std::uint8_t* scratch) {
  const int pairs = (inputs + 1) / 2;
  // 32 tokens of bf16 inputs at a time beside one slice of paired weights: both stay in the second-level cache.
  constexpr int kTokens = 32;
  std::uint8_t* weights = scratch;
  auto* narrow = reinterpret_cast<std::uint16_t*>(scratch + static_cast<std::size_t>(pairs) * 256);
  for (int start = 0; start < tokens; start += kTokens) {
    const int count = std::min(kTokens, tokens - start);
    for (int m = 0; m < count; ++m) {
      const float* from = values + static_cast<std::size_t>(start + m) * inputs;
      std::uint16_t* to = narrow + static_cast<std::size_t>(m) * pairs * 2;
      to[pairs * 2 - 1] = 0;
      int i = 0;
      for (; i + kLanes <= inputs; i += kLanes) store(to + i, _mm512_cvtneps_pbh((__m512)load<F>(from + i)));
      if (i < inputs) {
        const __m256bh rest = _mm512_cvtneps_pbh((__m512)load_some(from + i, inputs - i));
        std::memcpy(to + i, &rest, sizeof(std::uint16_t) * (inputs - i));
      }
    }
    for (int s = 0; s < block.slices; ++s) {
      for (int i = 0; i < pairs; ++i) {
        const std::uint8_t* row = block.rows + block.stride * 2 * i + s * kSlice * 2;
        const bool both = 2 * i + 1 < inputs;
        for (int h = 0; h < 2; ++h) {
          const __m512i a = load<__m512i>(row + h * 64);
          const __m512i b = both ? load<__m512i>(row + block.stride + h * 64) : _mm512_setzero_si512();
          store(weights + (i * 4 + 2 * h) * 64, _mm512_unpacklo_epi16(a, b));
          store(weights + (i * 4 + 2 * h + 1) * 64, _mm512_unpackhi_epi16(a, b));
        }
      }
      const std::size_t stride = static_cast<std::size_t>(pairs) * 2;
      float* to = out + start * out_stride + s * kSlice;
      const int tokens = count;
#define MAR_CALL(M) tile_bf16<M>(narrow + m * stride, stride, weights, pairs, to + m * out_stride, out_stride)
      MAR_TILES(6, MAR_CALL)
#undef MAR_CALL
    }
  }
}

#else

void block_bf16(Block block, int inputs, const float* values, int tokens, float* out, std::size_t out_stride,
                std::uint8_t* scratch) {
  float* weights = reinterpret_cast<float*>(scratch);
  for (int s = 0; s < block.slices; ++s) {
    for (int i = 0; i < inputs; ++i) {
      const auto* row = reinterpret_cast<const std::uint16_t*>(block.rows + block.stride * i) + s * kSlice;
      for (int v = 0; v < 4; ++v) store(weights + i * kSlice + v * kLanes, bf16_to_float(row + v * kLanes));
    }
    product(values, inputs, weights, kSlice, inputs, tokens, out + s * kSlice, out_stride, false);
  }
}

#endif

#if defined(__AVX512VNNI__)

template <int M>
inline void dots(const std::int8_t* codes, std::size_t stride, const std::uint8_t* weights, int quads,
                 __m512i sums[M][4]) {
  for (int i = 0; i < quads; ++i) {
    __m512i w[4];
    for (int v = 0; v < 4; ++v) w[v] = load<__m512i>(weights + (i * 4 + v) * 64);
    for (int m = 0; m < M; ++m) {
      std::int32_t four;
      std::memcpy(&four, codes + m * stride + 4 * i, 4);
      const __m512i x = _mm512_set1_epi32(four);
      for (int v = 0; v < 4; ++v) sums[m][v] = _mm512_dpbusd_epi32(sums[m][v], w[v], x);
    }
  }
}

template <int M>
inline void tile_i8(const std::int8_t* codes, std::size_t stride, const std::uint8_t* weights, int quads,
                    const float* scales, const std::int32_t* sums, const float* token_scales, float* out,
                    std::size_t out_stride) {
  __m512i acc[M][4];
  for (auto& row : acc)
    for (auto& one : row) one = _mm512_setzero_si512();
  dots<M>(codes, stride, weights, quads, acc);
  for (int m = 0; m < M; ++m) {
    __m512i ordered[4];
    in_order(acc[m][0], acc[m][1], acc[m][2], acc[m][3], ordered);
    const float factor = token_scales ? token_scales[m] : 1.0f;
    for (int v = 0; v < 4; ++v) {
      const F total = to_float((I)ordered[v] - 128 * sums[m]);
      store(out + m * out_stride + v * kLanes, total * (load<F>(scales + v * kLanes) * factor));
    }
  }
}

void block_i8(Block block, int inputs, const float* scales, const std::int8_t* codes, const std::int32_t* sums,
              const float* token_scales, int tokens, float* out, std::size_t out_stride, std::uint8_t* scratch) {
  const int quads = inputs / kQuad;
  for (int s = 0; s < block.slices; ++s) {
    for (int i = 0; i < quads; ++i) {
      const std::uint8_t* row = block.rows + block.stride * kQuad * i + s * kSlice;
      __m512i mixed[4];
      interleave(load<__m512i>(row), load<__m512i>(row + block.stride), load<__m512i>(row + 2 * block.stride),
                 load<__m512i>(row + 3 * block.stride), mixed);
      for (int v = 0; v < 4; ++v) store(scratch + (i * 4 + v) * 64, mixed[v]);
    }
#define MAR_CALL(M)                                                                                               \
  tile_i8<M>(codes + static_cast<std::size_t>(m) * inputs, inputs, scratch, quads, scales + s * kSlice, sums + m, \
             token_scales ? token_scales + m : nullptr, out + m * out_stride + s * kSlice, out_stride)
    MAR_TILES(6, MAR_CALL)
#undef MAR_CALL
  }
}

template <int M>
inline void tile_i4(const std::int8_t* codes, std::size_t stride, const std::uint8_t* weights, int quads,
                    const std::uint16_t* scales, std::size_t scale_stride, const std::int32_t* sums, int groups,
                    const float* token_scales, float* out, std::size_t out_stride) {
  F totals[M][4] = {};
  for (int g = 0; g < groups; ++g) {
    constexpr int kQuads = kGroup / kQuad;
    __m512i acc[M][4];
    for (auto& row : acc)
      for (auto& one : row) one = _mm512_setzero_si512();
    dots<M>(codes + g * kGroup, stride, weights + g * kQuads * 256, std::min(kQuads, quads - g * kQuads), acc);
    // Scales in the order of the registers: four outputs of each 128-bit lane.
    __m512i raw[4], mixed[4];
    for (int v = 0; v < 4; ++v) raw[v] = (__m512i)bf16_to_float(scales + g * scale_stride + v * kLanes);
    in_order(raw[0], raw[1], raw[2], raw[3], mixed);
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < 4; ++v)
        totals[m][v] += to_float((I)acc[m][v] - 8 * sums[m * groups + g]) * (F)mixed[v];
  }
  for (int m = 0; m < M; ++m) {
    F ordered[4];
    in_order(totals[m][0], totals[m][1], totals[m][2], totals[m][3], ordered);
    const float factor = token_scales ? token_scales[m] : 1.0f;
    for (int v = 0; v < 4; ++v) store(out + m * out_stride + v * kLanes, ordered[v] * factor);
  }
}

void block_i4(Block block, int inputs, const std::uint16_t* scales, std::size_t scale_stride, const std::int8_t* codes,
              const std::int32_t* sums, const float* token_scales, int tokens, float* out, std::size_t out_stride,
              std::uint8_t* scratch) {
  const int quads = inputs / kQuad, groups = (inputs + kGroup - 1) / kGroup;
  const __m512i low_half = _mm512_set1_epi8(15);
  for (int s = 0; s < block.slices; ++s) {
    // A line holds two slices: the even one in its low nibbles, the odd one in its high ones.
    for (int i = 0; i < quads; ++i) {
      const std::uint8_t* row = block.rows + block.stride * kQuad * i + s / 2 * kSlice;
      __m512i mixed[4];
      interleave(load<__m512i>(row), load<__m512i>(row + block.stride), load<__m512i>(row + 2 * block.stride),
                 load<__m512i>(row + 3 * block.stride), mixed);
      for (int v = 0; v < 4; ++v) {
        const __m512i half = s % 2 ? _mm512_srli_epi16(mixed[v], 4) : mixed[v];
        store(scratch + (i * 4 + v) * 64, _mm512_and_si512(half, low_half));
      }
    }
#define MAR_CALL(M)                                                                                              \
  tile_i4<M>(codes + static_cast<std::size_t>(m) * inputs, inputs, scratch, quads, scales + s * kSlice,          \
             scale_stride, sums + static_cast<std::size_t>(m) * groups, groups,                                  \
             token_scales ? token_scales + m : nullptr, out + m * out_stride + s * kSlice, out_stride)
    MAR_TILES(3, MAR_CALL)
#undef MAR_CALL
  }
}

#else

void block_i8(Block block, int inputs, const float* scales, const std::int8_t* codes, const std::int32_t* sums,
              const float* token_scales, int tokens, float* out, std::size_t out_stride, std::uint8_t*) {
  std::int32_t acc[kSlice];
  for (int s = 0; s < block.slices; ++s)
    for (int m = 0; m < tokens; ++m) {
      const Block one{block.rows + s * kSlice, block.stride, 1};
      rows_i8(one, {nullptr, codes + static_cast<std::size_t>(m) * inputs, nullptr, inputs}, acc);
      const float factor = token_scales ? token_scales[m] : 1.0f;
      for (int j = 0; j < kSlice; ++j)
        out[m * out_stride + s * kSlice + j] = (acc[j] - 128 * sums[m]) * (scales[s * kSlice + j] * factor);
    }
}

void block_i4(Block block, int inputs, const std::uint16_t* scales, std::size_t scale_stride, const std::int8_t* codes,
              const std::int32_t* sums, const float* token_scales, int tokens, float* out, std::size_t out_stride,
              std::uint8_t* scratch) {
  const int count = (inputs + kGroup - 1) / kGroup;
  int* ends = reinterpret_cast<int*>(scratch);
  for (int g = 0; g < count; ++g) ends[g] = std::min(inputs, (g + 1) * kGroup);
  for (int m = 0; m < tokens; ++m) {
    const Groups groups{ends, sums + static_cast<std::size_t>(m) * count, scales, scale_stride};
    float* to = out + m * out_stride;
    rows_i4(block, {nullptr, codes + static_cast<std::size_t>(m) * inputs, nullptr, inputs}, groups, to);
    if (token_scales)
      for (int j = 0; j < block.slices * kSlice; ++j) to[j] *= token_scales[m];
  }
}

#endif

// ---- one head of the mixer ----

inline int padded(int n) { return (n + kLanes - 1) / kLanes * kLanes; }

// `count` channels from `first` of the convolution at one token, whose predecessors are the rows before it.
inline void convolve(const Head& head, const float* const* rows, int first, int count, float* y) {
  for (int i = 0; i < count; ++i) y[i] = head.conv_bias[first + i];
  for (int k = 0; k < head.taps; ++k) {
    const float* weight = head.conv_weight + static_cast<std::size_t>(k) * head.channels + first;
    const float* row = rows[k] + first;
    for (int i = 0; i < count; ++i) y[i] += weight[i] * row[i];
  }
}

inline void to_length(float* v, int n, float length) {
  const float factor = length / std::sqrt(dot(v, v, n) + 1e-5f);
  for (int i = 0; i < n; ++i) v[i] *= factor;
}

constexpr int kMostTaps = 16;

inline void remember(const Head& head, const float* xbc, int first, int count) {
  for (int k = 0; k + 2 < head.taps; ++k) {
    float* to = head.conv_state + static_cast<std::size_t>(k) * head.channels + first;
    std::memcpy(to, to + head.channels, sizeof(float) * count);
  }
  if (head.taps > 1)
    std::memcpy(head.conv_state + static_cast<std::size_t>(head.taps - 2) * head.channels + first, xbc + first,
                sizeof(float) * count);
}

void head_step(const Head& head, const float* xbc, const float* gate, float log_decay, float* y, float* scratch) {
  const int width = head.width, size = head.size;
  float *x = scratch, *b = x + padded(width), *c = b + padded(size);
  const float* rows[kMostTaps];
  for (int k = 0; k + 1 < head.taps; ++k) rows[k] = head.conv_state + static_cast<std::size_t>(k) * head.channels;
  rows[head.taps - 1] = xbc;
  convolve(head, rows, head.x, width, x);
  convolve(head, rows, head.b, size, b);
  convolve(head, rows, head.c, size, c);
  remember(head, xbc, head.x, width);
  remember(head, xbc, head.b, size);
  remember(head, xbc, head.c, size);
  if (head.unit) {
    to_length(b, size, 1.0f);
    to_length(c, size, std::sqrt(static_cast<float>(size)));
  }
  const float decay = std::exp(log_decay);
  const float gain = head.gain ? -std::expm1(log_decay) : 1.0f;
  if (width % kLanes == 0 && width <= 4 * kLanes) {
    // The whole of y stays in registers.
    const int parts = width / kLanes;
    F scaled[4], total[4] = {};
    for (int v = 0; v < parts; ++v) scaled[v] = load<F>(x + v * kLanes) * gain;
    for (int n = 0; n < size; ++n) {
      float* state = head.state + static_cast<std::size_t>(n) * width;
      for (int v = 0; v < parts; ++v) {
        const F s = load<F>(state + v * kLanes) * decay + scaled[v] * b[n];
        store(state + v * kLanes, s);
        total[v] += s * c[n];
      }
    }
    for (int v = 0; v < parts; ++v) store(y + v * kLanes, total[v]);
  } else {
    std::fill(y, y + width, 0.0f);
    for (int n = 0; n < size; ++n) {
      float* state = head.state + static_cast<std::size_t>(n) * width;
      for (int p = 0; p < width; ++p) {
        state[p] = state[p] * decay + x[p] * gain * b[n];
        y[p] += state[p] * c[n];
      }
    }
  }
  for (int p = 0; p < width; ++p) {
    y[p] += head.skip * x[p];
    x[p] = gate[p] + head.gate_bias[p];
  }
  gated(x, y, width, y);
}

// out (rows x columns) = or += a (rows x k) times b (k x columns); strides in floats, columns padded to lanes.
inline void small_product(const float* a, int a_stride, const float* b, int b_stride, int k, int rows, int columns,
                          float* out, int out_stride, bool plus) {
  int j = 0;
  for (; j + kSlice <= columns; j += kSlice)
    product(a, a_stride, b + j, b_stride, k, rows, out + j, out_stride, plus);
  for (; j < columns; j += kLanes)
    for (int m = 0; m < rows; ++m) {
      F total = plus ? load<F>(out + m * out_stride + j) : F{};
      for (int i = 0; i < k; ++i) total += load<F>(b + i * b_stride + j) * a[m * a_stride + i];
      store(out + m * out_stride + j, total);
    }
}

void head_scan(const Head& head, const float* xbc, std::size_t xbc_stride, const float* gate, std::size_t gate_stride,
               const float* log_decay, std::size_t decay_stride, int tokens, float* y, std::size_t y_stride,
               float* scratch) {
  const int width = head.width, size = head.size, p = padded(width), n = padded(size);
  if (tokens == 1) return head_step(head, xbc, gate, log_decay[0], y, scratch);
  float* x = scratch;                  // chunk x p: after the convolution
  float* scaled = x + kChunk * p;      // chunk x p: times gain
  float* result = scaled + kChunk * p; // chunk x p
  float* b = result + kChunk * p;      // chunk x n
  float* c = b + kChunk * n;           // chunk x n
  float* turned = c + kChunk * n;      // n x chunk: B transposed
  float* seen = turned + kChunk * n;   // chunk x n: C times what is left of the state before the chunk
  float* mix = seen + kChunk * n;      // chunk x chunk
  float* decay = mix + kChunk * kChunk;  // chunk
  float* left = decay + kChunk;          // chunk: what is left now of each token of the chunk
  std::fill(scratch, scratch + head_scratch(width, size), 0.0f);
  for (int start = 0; start < tokens; start += kChunk) {
    const int q = std::min(kChunk, tokens - start);
    for (int t = 0; t < q; ++t) {
      const float* rows[kMostTaps];
      for (int k = 0; k < head.taps; ++k) {
        const int back = start + t - (head.taps - 1 - k);
        rows[k] = back >= 0 ? xbc + back * xbc_stride
                            : head.conv_state + static_cast<std::ptrdiff_t>(head.taps - 1 + back) * head.channels;
      }
      convolve(head, rows, head.x, width, x + t * p);
      convolve(head, rows, head.b, size, b + t * n);
      convolve(head, rows, head.c, size, c + t * n);
      if (head.unit) {
        to_length(b + t * n, size, 1.0f);
        to_length(c + t * n, size, std::sqrt(static_cast<float>(size)));
      }
      const float step = log_decay[(start + t) * decay_stride];
      decay[t] = std::exp(step);
      const float gain = head.gain ? -std::expm1(step) : 1.0f;
      for (int i = 0; i < width; ++i) scaled[t * p + i] = x[t * p + i] * gain;
    }
    float carry = 1.0f;
    for (int t = 0; t < q; ++t) {
      for (int i = 0; i < size; ++i) turned[i * kChunk + t] = b[t * n + i];
      carry *= decay[t];
      for (int i = 0; i < n; i += kLanes) store(seen + t * n + i, load<F>(c + t * n + i) * carry);
    }
    small_product(c, n, turned, kChunk, size, q, padded(q), mix, kChunk, false);
    // Decays are multiplied up: differences of their logarithms' sums would be rounded where one of them is strong.
    std::fill(left, left + kChunk, 0.0f);
    for (int t = 0; t < q; ++t) {
      for (int s = 0; s < padded(t + 1); s += kLanes) store(left + s, load<F>(left + s) * decay[t]);
      left[t] = 1.0f;
      for (int s = 0; s < padded(t + 1); s += kLanes)
        store(mix + t * kChunk + s, load<F>(mix + t * kChunk + s) * load<F>(left + s));
      std::fill(mix + t * kChunk + t + 1, mix + t * kChunk + kChunk, 0.0f);
    }
    small_product(mix, kChunk, scaled, p, q, q, p, result, p, false);
    // The state's rows are `width` apart, which the products read in whole lanes: go through a padded copy.
    if (p == width) {
      small_product(seen, n, head.state, p, size, q, p, result, p, true);
    } else {
      for (int t = 0; t < q; ++t)
        for (int i = 0; i < size; ++i)
          for (int j = 0; j < width; ++j)
            result[t * p + j] += seen[t * n + i] * head.state[static_cast<std::size_t>(i) * width + j];
    }
    for (int i = 0; i < size; ++i)
      for (int t = 0; t < padded(q); t += kLanes)
        store(turned + i * kChunk + t, load<F>(turned + i * kChunk + t) * load<F>(left + t));
    for (std::size_t i = 0; i < static_cast<std::size_t>(size) * width; ++i) head.state[i] *= carry;
    if (p == width) {
      small_product(turned, kChunk, scaled, p, q, size, p, head.state, p, true);
    } else {
      for (int i = 0; i < size; ++i)
        for (int t = 0; t < q; ++t)
          for (int j = 0; j < width; ++j)
            head.state[static_cast<std::size_t>(i) * width + j] += turned[i * kChunk + t] * scaled[t * p + j];
    }
    for (int t = 0; t < q; ++t) {
      float* to = y + (start + t) * y_stride;
      const float* z = gate + (start + t) * gate_stride;
      float* open = scaled + t * p;
      for (int i = 0; i < width; ++i) {
        to[i] = result[t * p + i] + head.skip * x[t * p + i];
        open[i] = z[i] + head.gate_bias[i];
      }
      gated(open, to, width, to);
    }
  }
  // The last K - 1 tokens, older ones from the state before.
  const int kept = head.taps - 1;
  const int firsts[3] = {head.x, head.b, head.c}, counts[3] = {width, size, size};
  for (int part = 0; part < 3; ++part)
    for (int k = 0; k < kept; ++k) {
      const int from = tokens - kept + k;
      const float* row = from >= 0 ? xbc + from * xbc_stride
                                   : head.conv_state + static_cast<std::size_t>(kept + from) * head.channels;
      std::memmove(head.conv_state + static_cast<std::size_t>(k) * head.channels + firsts[part], row + firsts[part],
                   sizeof(float) * counts[part]);
    }
}

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {rms_norm, encode,    quantise,  dot,        add,      gated,    rows_f32,  rows_bf16,
                         rows_i8,  rows_i4,   block_f32, block_bf16, block_i8, block_i4, head_step, head_scan};

}  // namespace MAR_VARIANT
}  // namespace mar
