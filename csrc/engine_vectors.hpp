// Vectors of floats for the engine's kernels, as wide as the instruction set's: what is wider, GCC 12 keeps in memory.
// Does: load, round, exponential, dot product, gate, small fp32 products, and the byte order of AVX-512's integer
// products. Does not: hold kernels. Included inside each variant only; all of it is local to the file that includes it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels.hpp"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace mar::MAR_VARIANT {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kAcross = 4;  // vectors of a product's tile: with six tokens, 24 of 32 registers hold sums
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kAcross = 2;
#else
constexpr int kLanes = 4;
constexpr int kAcross = 2;
#endif
constexpr int kParts = kSlice / kLanes;  // vectors of a slice
using F = float __attribute__((vector_size(kLanes * 4)));
using I = std::int32_t __attribute__((vector_size(kLanes * 4)));

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
#if defined(__AVX512F__)
  // GCC 12 makes of the conversion below two halves that go through memory.
  return (F)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load<__m256i>(from)), 16);
#else
  using U = std::uint16_t __attribute__((vector_size(kLanes * 2)));
  using W = std::uint32_t __attribute__((vector_size(kLanes * 4)));
  return reinterpret_cast<F>(__builtin_convertvector(load<U>(from), W) << 16);
#endif
}
inline float bf16_to_float(std::uint16_t x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline int padded(int n) { return static_cast<int>(filled16(n)); }  // whole vectors, of every instruction set

inline float dot(const float* x, const float* y, int n) {
  F total{};
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) total += load<F>(x + i) * load<F>(y + i);
  float rest = sum(total);
  for (; i < n; ++i) rest += x[i] * y[i];
  return rest;
}

inline void gated(const float* gate, const float* up, int n, float* y) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, silu(load<F>(gate + i)) * load<F>(up + i));
  if (i < n) {
    const F v = silu(load_some(gate + i, n - i)) * load_some(up + i, n - i);
    for (int j = 0; i + j < n; ++j) y[i + j] = v[j];
  }
}

// out (m x kAcross vectors) = a (m x k) times b, or plus; for M rows of a.
template <int M>
inline void tile_float(const float* a, std::size_t a_stride, const float* b, std::size_t b_stride, int k, float* out,
                       std::size_t out_stride, bool plus) {
  F sums[M][kAcross];
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < kAcross; ++v) sums[m][v] = plus ? load<F>(out + m * out_stride + v * kLanes) : F{};
  for (int i = 0; i < k; ++i) {
    F w[kAcross];
    for (int v = 0; v < kAcross; ++v) w[v] = load<F>(b + i * b_stride + v * kLanes);
    for (int m = 0; m < M; ++m) {
      const F x = splat(a[m * a_stride + i]);
      for (int v = 0; v < kAcross; ++v) sums[m][v] += x * w[v];
    }
  }
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < kAcross; ++v) store(out + m * out_stride + v * kLanes, sums[m][v]);
}

// Calls tile<M> over `tokens` rows from `first` on, the widest tile first, then one of `middle` rows, then of one.
#define MAR_TILES(first, widest, middle, call) \
  for (int m = first; m < tokens;) {    \
    const int left = tokens - m;        \
    if (left >= widest) {               \
      call(widest);                     \
      m += widest;                      \
    } else if (left >= middle) {        \
      call(middle);                     \
      m += middle;                      \
    } else {                            \
      call(1);                          \
      m += 1;                           \
    }                                   \
  }

// out (tokens x 64) = a (tokens x k) times b (k x 64), or plus.
inline void product(const float* a, std::size_t a_stride, const float* b, std::size_t b_stride, int k, int tokens,
                    float* out, std::size_t out_stride, bool plus) {
  for (int j = 0; j < kSlice; j += kAcross * kLanes) {
#define MAR_CALL(M) \
  tile_float<M>(a + m * a_stride, a_stride, b + j, b_stride, k, out + m * out_stride + j, out_stride, plus)
    MAR_TILES(0, 6, 2, MAR_CALL)
#undef MAR_CALL
  }
}

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

#endif

}  // namespace
}  // namespace mar::MAR_VARIANT
