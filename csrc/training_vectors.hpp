// Vectors of the variant's width, from the compiler's vector types: one source for every instruction set.
// Does: load and store fp32 and bf16, transpose, exponential, small matrix products. Included inside each variant only.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace mar::MAR_VARIANT {
namespace {

#if defined(__AVX512F__)
constexpr int W = 16;  // floats in a vector
constexpr int kBlock = 4;  // vectors of a product's tile: with four rows, 16 of 32 registers accumulate
#elif defined(__AVX2__)
constexpr int W = 8;
constexpr int kBlock = 2;
#else
constexpr int W = 4;
constexpr int kBlock = 2;
#endif
constexpr int kRows = 4;

typedef float Floats __attribute__((vector_size(W * 4)));
typedef std::int32_t Ints __attribute__((vector_size(W * 4)));
typedef std::uint32_t Words __attribute__((vector_size(W * 4)));
typedef std::uint16_t Halves __attribute__((vector_size(W * 2)));

struct BFloat {
  std::uint16_t bits;
};

inline Floats splat(float value) { return Floats{} + value; }

inline Floats load(const float* from) {
  Floats v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
// Widened and narrowed by hand: GCC 12 makes two halves of each conversion and joins them again.
inline Floats load(const BFloat* from) {
  Halves half;
  std::memcpy(&half, from, sizeof half);
#if defined(__AVX512F__)
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)half), 16);
#elif defined(__AVX2__)
  return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)half), 16);
#else
  return (Floats)(__builtin_convertvector(half, Words) << 16);
#endif
}
inline void store(float* to, Floats v) { std::memcpy(to, &v, sizeof v); }
inline void store(BFloat* to, Floats v) {
#if defined(__AVX512BF16__)
  const __m256bh half = _mm512_cvtneps_pbh((__m512)v);  // to nearest, ties to even; what is below 2^-126 becomes zero
#else
  const Words bits = (Words)v;
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  const Words kept = v == v ? rounded : Words{} + 0x7fc0;
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i narrow = _mm256_packus_epi32((__m256i)kept, (__m256i)kept);
  const __m128i half = _mm256_castsi256_si128(_mm256_permute4x64_epi64(narrow, 0x08));
#else
  const Halves half = __builtin_convertvector(kept, Halves);
#endif
#endif
  std::memcpy(to, &half, sizeof half);
}

// The first `count` lanes, zeros behind them.
template <class T>
inline Floats load(const T* from, std::int64_t count) {
  if (count >= W) return load(from);
  T part[W] = {};
  std::memcpy(part, from, sizeof(T) * static_cast<std::size_t>(count));
  return load(part);
}
template <class T>
inline void store(T* to, Floats v, std::int64_t count) {
  if (count >= W) return store(to, v);
  T part[W];
  store(part, v);
  std::memcpy(to, part, sizeof(T) * static_cast<std::size_t>(count));
}


inline float sum(Floats v) {
  float lanes[W];
  std::memcpy(lanes, &v, sizeof v);
  for (int half = W / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// e^x within 2 ulp for x in [-87, 88], and held at the ends of that range; NaN stays NaN.
inline Floats exponential(Floats x) {
  const Floats low = splat(-87.0f), high = splat(88.0f);
  x = x < low ? low : x;
  x = x > high ? high : x;
  const Floats magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Floats shifted = x * 1.44269504088896341f + magic;
  const Floats n = shifted - magic;
  Floats r = x - n * 0.693145751953125f;
  r = r - n * 1.42860682030941723e-6f;
  Floats p = splat(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Words power = (((Words)shifted - 0x4b400000u) + 127u) << 23;
  return p * (Floats)power;
}

inline Floats sigmoid(Floats x) { return 1.0f / (1.0f + exponential(-x)); }

template <int... I>
struct Lanes {};
template <int N, int... I>
struct CountLanes : CountLanes<N - 1, N - 1, I...> {};
template <int... I>
struct CountLanes<0, I...> {
  using Type = Lanes<I...>;
};
template <int... I>
inline void interleave(Floats& a, Floats& b, Lanes<I...>) {
  const Floats low = __builtin_shufflevector(a, b, (I / 2 + (I % 2) * W)...);
  const Floats high = __builtin_shufflevector(a, b, (W / 2 + I / 2 + (I % 2) * W)...);
  a = low;
  b = high;
}

// to[j][i] = from[i][j]; rows and columns are multiples of W.
inline void transpose(float* to, std::int64_t to_stride, const float* from, std::int64_t from_stride,
                      std::int64_t rows, std::int64_t columns) {
  for (std::int64_t i = 0; i < rows; i += W)
    for (std::int64_t j = 0; j < columns; j += W) {
      Floats v[W];
#pragma GCC unroll 16
      for (int k = 0; k < W; ++k) v[k] = load(from + (i + k) * from_stride + j);
      // log2(W) perfect shuffles of the rows are a transposition.
#pragma GCC unroll 4
      for (int stage = 1; stage < W; stage *= 2) {
        Floats next[W];
#pragma GCC unroll 8
        for (int k = 0; k < W / 2; ++k) {
          next[2 * k] = v[k];
          next[2 * k + 1] = v[k + W / 2];
          interleave(next[2 * k], next[2 * k + 1], typename CountLanes<W>::Type{});
        }
#pragma GCC unroll 16
        for (int k = 0; k < W; ++k) v[k] = next[k];
      }
#pragma GCC unroll 16
      for (int k = 0; k < W; ++k) store(to + (j + k) * to_stride + i, v[k]);
    }
}

// Which entries A[m][k] of a square left factor are not known to be zero.
enum class Band { full, lower, upper };

// How a product multiplies: with fp32 factors as they are, or with factors rounded to bf16 and packed in pairs along the
// inner dimension. A factor comes in one of three forms: its rows, its columns (pairs of rows), or transposed.

struct Factor {
  const float* data;  // where packed, 32 bits of a pair: the even place in the lower half, the next in the upper
  std::int64_t stride;
};

// The left factor of a product: unit (m, k) at data[m * row + k * column].
struct Left {
  const float* data;
  std::int64_t row, column;
};
inline Left by_rows(Factor factor) { return {factor.data, factor.stride, 1}; }
inline Left by_columns(Factor factor) { return {factor.data, 1, factor.stride}; }

struct Plain {
  static constexpr int kStep = 1;
  static Floats add(Floats total, float left, Floats right) { return total + left * right; }
  static Factor rows(const float* m, std::int64_t stride, std::int64_t, std::int64_t, float*&) {
    return {m, stride};
  }
  static Factor columns(const float* m, std::int64_t stride, std::int64_t, std::int64_t, float*&) {
    return {m, stride};
  }
  static Factor turned(const float* m, std::int64_t stride, std::int64_t rows, std::int64_t columns, float*& memory) {
    float* to = memory;
    memory += rows * columns;
    transpose(to, rows, m, stride, rows, columns);
    return {to, rows};
  }
};

#if defined(__AVX512BF16__)
struct Pairs {
  static constexpr int kStep = 2;
  static Floats add(Floats total, float left, Floats right) {
    return (Floats)_mm512_dpbf16_ps((__m512)total, (__m512bh)_mm512_set1_ps(left), (__m512bh)right);
  }
  static Factor rows(const float* m, std::int64_t stride, std::int64_t rows, std::int64_t columns, float*& memory) {
    float* to = memory;
    memory += rows * columns / 2;
    for (std::int64_t i = 0; i < rows; ++i)
      for (std::int64_t j = 0; j < columns; j += W) {
        const __m256bh half = _mm512_cvtneps_pbh((__m512)load(m + i * stride + j));
        std::memcpy(to + (i * columns + j) / 2, &half, sizeof half);
      }
    return {to, columns / 2};
  }
  static Factor columns(const float* m, std::int64_t stride, std::int64_t rows, std::int64_t columns, float*& memory) {
    float* to = memory;
    memory += rows * columns / 2;
    for (std::int64_t i = 0; i < rows; i += 2)
      for (std::int64_t j = 0; j < columns; j += W) {
        const Words even = widen(_mm512_cvtneps_pbh((__m512)load(m + i * stride + j)));
        const Words odd = widen(_mm512_cvtneps_pbh((__m512)load(m + (i + 1) * stride + j)));
        store(to + i / 2 * columns + j, (Floats)(even | odd << 16));
      }
    return {to, columns};
  }
  static Words widen(__m256bh half) { return __builtin_convertvector((Halves)half, Words); }
  static Factor turned(const float* m, std::int64_t stride, std::int64_t rows, std::int64_t columns, float*& memory) {
    float* to = memory;
    memory += rows * columns / 2;
    for (std::int64_t i = 0; i < rows; i += W)
      for (std::int64_t j = 0; j < columns; j += W) {
        // W rows of W / 2 words become W / 2 rows of W words.
        float words[W * W] = {};
        for (int k = 0; k < W; ++k) {
          const __m256bh half = _mm512_cvtneps_pbh((__m512)load(m + (i + k) * stride + j));
          std::memcpy(words + k * W, &half, sizeof half);
        }
        float across[W * W];
        transpose(across, W, words, W, W, W);
        for (int k = 0; k < W / 2; ++k) store(to + (j / 2 + k) * rows + i, load(across + k * W));
      }
    return {to, rows};
  }
};
#endif

template <class P, int Vectors, bool Add>
inline void tile(float* out, std::int64_t out_stride, const Left& a, std::int64_t m, const float* b,
                 std::int64_t b_stride, std::int64_t k_begin, std::int64_t k_end) {
  Floats total[kRows][Vectors];
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) total[i][j] = Add ? load(out + i * out_stride + j * W) : Floats{};
  const float* left = a.data + m * a.row + k_begin * a.column;
  const float* right = b + k_begin * b_stride;
  for (std::int64_t k = k_begin; k < k_end; ++k, left += a.column, right += b_stride) {
    Floats row[Vectors];
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) row[j] = load(right + j * W);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      const float factor = left[i * a.row];
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) total[i][j] = P::add(total[i][j], factor, row[j]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) store(out + i * out_stride + j * W, total[i][j]);
}

// out = A B, or out += A B. rows is a multiple of kRows, columns of W; factors are zero from `inner` up to whole vectors.
// With `square_lower` only entries up to the diagonal are wanted, and what is written right of it is of no use.
template <class P, bool Add, Band band = Band::full, bool square_lower = false>
inline void product(float* out, std::int64_t out_stride, Left a, Factor b, std::int64_t rows,
                    std::int64_t columns, std::int64_t inner) {
  for (std::int64_t m = 0; m < rows; m += kRows) {
    const std::int64_t k_begin = band == Band::upper ? m / P::kStep : 0;
    const std::int64_t last = band == Band::lower && m + kRows < inner ? m + kRows : inner;
    const std::int64_t k_end = (last + P::kStep - 1) / P::kStep;
    const std::int64_t wanted = (m + kRows + W - 1) / W * W;
    const std::int64_t n_end = square_lower && wanted < columns ? wanted : columns;
    float* row = out + m * out_stride;
    std::int64_t n = 0;
    for (; n + kBlock * W <= n_end; n += kBlock * W)
      tile<P, kBlock, Add>(row + n, out_stride, a, m, b.data + n, b.stride, k_begin, k_end);
    for (; n < n_end; n += W) tile<P, 1, Add>(row + n, out_stride, a, m, b.data + n, b.stride, k_begin, k_end);
  }
}

}  // namespace
}  // namespace mar::MAR_VARIANT
