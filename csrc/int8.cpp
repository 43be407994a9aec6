// int8 matrix products for training: what is multiplied is rounded to 8 bits, sums are exact, results are fp32.
// Compiled once per instruction set. Does: round rows and columns, each with a scale of its own; bring weights, activations
// and gradients into the order of the multiplying instruction; multiply. Does not: keep anything from call to call.
#include "avx2.hpp"
#include "training_kernels.hpp"

#if defined(__AVX512VNNI__)
#include <immintrin.h>
#endif

namespace mar::MAR_VARIANT {
namespace {

constexpr Count kSlice = 32;           // columns of a panel: with an inner dimension of 1,000 it fits the first-level cache
constexpr Count kVectors = kSlice / W;
constexpr Count kQuad = 4;             // numbers of the inner dimension that one instruction takes
constexpr Count kLine = kSlice * kQuad;
constexpr Count kRowsOfProduct = 256;  // rows that one item multiplies: they stay in the second-level cache
constexpr Count kRowsOfItem = 16;
constexpr Count kAhead = 1024;           // numbers that rows are asked for before they are read

// Sizes are compared as integers: the order is the same, and NaN is larger than all.
inline Ints magnitude(Floats v) { return (Ints)v & 0x7fffffff; }
inline Ints larger(Ints a, Ints b) { return a > b ? a : b; }
inline float largest(Ints sizes) {
  std::int32_t most = 0;
  for (int i = 0; i < W; ++i) most = sizes[i] > most ? sizes[i] : most;
  float found;
  std::memcpy(&found, &most, sizeof found);
  return found;
}

// To the nearest, ties to even, held within [-127, 127]; NaN, which scales show, becomes -127.
inline Ints rounded(Floats v) {
  v = v > -127.0f ? v : splat(-127.0f);
  v = v < 127.0f ? v : splat(127.0f);
  const Floats magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  return __builtin_convertvector((v + magic) - magic, Ints);
}
#if defined(__AVX2__) && !defined(__AVX512F__)
inline void store(std::int8_t* to, Ints v) { store_bytes((__m256i)v, to); }
#else
typedef std::int8_t Bytes __attribute__((vector_size(W)));
inline void store(std::int8_t* to, Ints v) {
  const Bytes bytes = __builtin_convertvector(v, Bytes);
  std::memcpy(to, &bytes, sizeof bytes);
}
#endif

// codes = x * by / scale, scale = max |x * by| / 127, or 1 if `whole`; NaN where x * by is not finite. Returns the scale;
// n is a multiple of kSlice.
inline float round_row(const float* x, const float* by, Count n, bool whole, std::int8_t* codes) {
  Ints sizes{};
  for (Count j = 0; j < n; j += W) {
    __builtin_prefetch(x + j + kAhead, 0, 2);
    sizes = larger(sizes, magnitude(load(x + j) * load(by + j)));
  }
  const float most = largest(sizes);
  const float scale = most - most != 0.0f ? most - most : whole ? 1.0f : most / 127.0f;
  const Floats inverse = splat(scale > 0 ? 1.0f / scale : 0.0f);
  for (Count j = 0; j < n; j += W) store(codes + j, rounded(load(x + j) * load(by + j) * inverse));
  return scale;
}

inline std::int32_t sum_of(const std::int8_t* codes, Count n) {
  std::int32_t total = 0;
  for (Count j = 0; j < n; ++j) total += codes[j];
  return total;
}

// A quad of rows of 64 bytes side by side, four bytes of one column after those of the one before; off by `plus`.
inline void interleave_quad(const std::int8_t* rows, Count stride, std::uint8_t plus, std::uint8_t* to) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m128i top = _mm_set1_epi8(static_cast<char>(plus));
  for (Count n = 0; n < kSlice; n += 16) {
    __m128i four[kQuad];
    for (Count j = 0; j < kQuad; ++j)
      four[j] = _mm_xor_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(rows + j * stride + n)), top);
    store_quad(four, to + n * kQuad);
  }
#else
  for (Count n = 0; n < kSlice; ++n)
    for (Count j = 0; j < kQuad; ++j)
      to[n * kQuad + j] = static_cast<std::uint8_t>(rows[j * stride + n]) ^ plus;  // + 128 is a change of the top bit
#endif
}

#if defined(__AVX512VNNI__)

// M rows of codes times a panel. The 24 sums of 12 rows stay in registers.
template <int M>
inline void tile(const std::int8_t* codes, Count row, Count quad, const std::uint8_t* panel, Count quads,
                 const float* scales, const std::int32_t* sums, const float* column_scales, float* out, Count stride) {
  constexpr int V = kVectors;
  Ints acc[M][V] = {};
  for (Count i = 0; i < quads; ++i) {
    __m512i w[V];
    for (int v = 0; v < V; ++v) w[v] = _mm512_loadu_si512(panel + i * kLine + v * 64);
    for (int m = 0; m < M; ++m) {
      std::int32_t four;
      std::memcpy(&four, codes + m * row + i * quad, sizeof four);
      const __m512i x = _mm512_set1_epi32(four);
      for (int v = 0; v < V; ++v) acc[m][v] = (Ints)_mm512_dpbusd_epi32((__m512i)acc[m][v], w[v], x);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V; ++v) {
      const Floats total = __builtin_convertvector(acc[m][v] - 128 * sums[m], Floats);
      store(out + m * stride + v * W, total * (load(column_scales + v * W) * scales[m]));
    }
}

#elif defined(MAR_AVXVNNI)

// M rows of codes times a panel: half of it at a time, of which six rows' sums stay in registers.
template <int M>
inline void tile(const std::int8_t* codes, Count row, Count quad, const std::uint8_t* panel, Count quads,
                 const float* scales, const std::int32_t* sums, const float* column_scales, float* out, Count stride) {
  constexpr int R = M % 6 == 0 ? 6 : M % 4 == 0 ? 4 : 1;
  constexpr Count kHalf = kSlice / 2;
  for (int m = 0; m < M; m += R)
    for (Count half = 0; half < kSlice; half += kHalf) {
      __m256i acc[R][2] = {};
      for (Count i = 0; i < quads; ++i) {
        const auto* from = reinterpret_cast<const __m256i*>(panel + i * kLine + half * kQuad);
        const __m256i w[2] = {_mm256_loadu_si256(from), _mm256_loadu_si256(from + 1)};
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
          const __m256i x = four_bytes(codes + (m + r) * row + i * quad);
          acc[r][0] = plus_dots(acc[r][0], w[0], x);
          acc[r][1] = plus_dots(acc[r][1], w[1], x);
        }
      }
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < 2; ++v) {
          const Count column = half + v * W;
          const Floats total = __builtin_convertvector((Ints)acc[r][v] - 128 * sums[m + r], Floats);
          store(out + (m + r) * stride + column, total * (load(column_scales + column) * scales[m + r]));
        }
    }
}

#elif defined(__AVX2__) && !defined(__AVX512F__)

// Pairs of the inner dimension are multiplied in 16 bits, as 255 times 127 is too much for AVX2's pairs of bytes. A panel is
// widened once for all rows of an item, in parts that stay in the second-level cache; its halves of 16 columns, of which
// six rows' sums stay in registers, are multiplied one after the other.
constexpr Count kDeep = 1024;        // of the inner dimension, in a part
constexpr Count kHalf = kSlice / 2;
constexpr int kMost = 6;

struct Part {
  alignas(32) std::int16_t weights[2 * kDeep * kHalf];   // [half][pair][column][2]
  alignas(32) std::int16_t codes[kMost * kDeep];         // of the rows that are being multiplied
  std::int32_t sums[kRowsOfProduct * kSlice];
};

// Two of each four bytes, from `first` on, to 16 bits.
inline __m256i pairs_of(__m256i quads, int first) {
  const char a = static_cast<char>(first), b = static_cast<char>(first + 1);
  const __m128i places = _mm_add_epi8(_mm_setr_epi8(a, -128, b, -128, a, -128, b, -128, a, -128, b, -128, a, -128, b, -128),
                                      _mm_setr_epi8(0, 0, 0, 0, 4, 0, 4, 0, 8, 0, 8, 0, 12, 0, 12, 0));
  return _mm256_shuffle_epi8(quads, _mm256_broadcastsi128_si256(places));
}

inline void widen_panel(const std::uint8_t* panel, Count quads, std::int16_t* to) {
  for (Count half = 0; half < 2; ++half)
    for (Count i = 0; i < quads; ++i, to += kHalf * kQuad)
      for (Count eight = 0; eight < 2; ++eight) {
        const std::uint8_t* from = panel + i * kLine + (half * kHalf + eight * 8) * kQuad;
        const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        _mm256_store_si256(reinterpret_cast<__m256i*>(to + eight * 16), pairs_of(bytes, 0));
        _mm256_store_si256(reinterpret_cast<__m256i*>(to + kHalf * 2 + eight * 16), pairs_of(bytes, 2));
      }
}

// Codes of M rows that lie in a row each: widened, one row after the other.
template <int M>
inline void widen_rows(const std::int8_t* codes, Count row, Count count, std::int16_t* to) {
  for (Count m = 0; m < M; ++m, codes += row, to += count) {
    Count k = 0;
    for (; k + 16 <= count; k += 16)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + k),
                          _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + k))));
    for (; k < count; ++k) to[k] = codes[k];
  }
}

// Codes of M rows that lie in a panel: widened, quad after quad.
template <int M>
inline void widen_turned(const std::int8_t* codes, Count quads, std::int16_t* to) {
  constexpr int kTwo = M < 2 ? M : 2;
  for (Count i = 0; i < quads; ++i, codes += kLine)
    for (int m = 0; m < M; m += kTwo, to += kTwo * kQuad) {
      std::int64_t bytes = 0;
      std::memcpy(&bytes, codes + m * kQuad, kTwo * kQuad);
      const __m128i words = _mm_cvtepi8_epi16(_mm_cvtsi64_si128(bytes));
      std::memcpy(to, &words, kTwo * kQuad * sizeof *to);
    }
}

// sums (rows kSlice apart) += M rows of codes times half a panel.
template <int M>
inline void add_tile(const std::int16_t* codes, Count row, Count quad, const std::int16_t* weights, Count quads,
                     std::int32_t* sums) {
  __m256i acc[M][2];
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) acc[m][v] = _mm256_loadu_si256(reinterpret_cast<__m256i*>(sums + m * kSlice + v * 8));
  for (Count i = 0; i < quads; ++i)
#pragma GCC unroll 2
    for (int pair = 0; pair < 2; ++pair) {
      const auto* w = reinterpret_cast<const __m256i*>(weights + i * kHalf * kQuad + pair * kHalf * 2);
      const __m256i w0 = _mm256_load_si256(w), w1 = _mm256_load_si256(w + 1);
#pragma GCC unroll 6
      for (int m = 0; m < M; ++m) {
        std::int32_t two;
        std::memcpy(&two, codes + m * row + i * quad + 2 * pair, sizeof two);
        const __m256i x = _mm256_set1_epi32(two);
        acc[m][0] = plus_32(acc[m][0], _mm256_madd_epi16(w0, x));
        acc[m][1] = plus_32(acc[m][1], _mm256_madd_epi16(w1, x));
      }
    }
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + m * kSlice + v * 8), acc[m][v]);
}

// sums += M rows of codes times a part of a panel.
template <int M>
inline void add_rows(const Int8Product& call, Part& part, const std::int8_t* codes, Count quads, std::int32_t* sums) {
  if (call.turned)
    widen_turned<M>(codes, quads, part.codes);
  else
    widen_rows<M>(codes, call.inner, quads * kQuad, part.codes);
  const Count row = call.turned ? kQuad : quads * kQuad, quad = call.turned ? M * kQuad : kQuad;
  for (Count half = 0; half < 2; ++half)
    add_tile<M>(part.codes, row, quad, part.weights + half * quads * kQuad * kHalf, quads, sums + half * kHalf);
}

#else

template <int M>
inline void tile(const std::int8_t* codes, Count row, Count quad, const std::uint8_t* panel, Count quads,
                 const float* scales, const std::int32_t* sums, const float* column_scales, float* out, Count stride) {
  for (int m = 0; m < M; ++m) {
    std::int32_t acc[kSlice] = {};
    for (Count i = 0; i < quads; ++i) {
      const std::int8_t* x = codes + m * row + i * quad;
      const std::uint8_t* w = panel + i * kLine;
      for (Count n = 0; n < kSlice; ++n)
        for (Count j = 0; j < kQuad; ++j) acc[n] += w[n * kQuad + j] * x[j];
    }
    for (Count n = 0; n < kSlice; ++n)
      out[m * stride + n] = static_cast<float>(acc[n] - 128 * sums[m]) * (column_scales[n] * scales[m]);
  }
}

#endif

}  // namespace

Count int8_row_items(const Int8Rows& call) { return (call.rows + kRowsOfItem - 1) / kRowsOfItem; }

void int8_rows(const Int8Rows& call, Count item) {
  const Count n = call.columns, begin = item * kRowsOfItem;
  const Count end = begin + kRowsOfItem < call.rows ? begin + kRowsOfItem : call.rows;
  const float* by = input<float>(call.by);
  for (Count i = begin; i < end; ++i) {
    std::int8_t* codes = output<std::int8_t>(call.codes, i * n);
    *output<float>(call.scales, i) = round_row(input<float>(call.input, i * call.stride), by, n, call.whole, codes);
    *output<std::int32_t>(call.sums, i) = sum_of(codes, n);
  }
}

void int8_maxima(const Int8Rows& call, Count item) {
  const float* x = input<float>(call.input, item * kSlice);
  float* out = output<float>(call.scales, item * kSlice);
  Ints most[kVectors] = {};
  for (Count i = 0; i < call.rows; ++i)
    for (Count v = 0; v < kVectors; ++v) most[v] = larger(most[v], magnitude(load(x + i * call.stride + v * W)));
  for (Count v = 0; v < kVectors; ++v) store(out + v * W, (Floats)most[v]);
}

void int8_weights(const Int8Weights& call, Count item) {
  const Count inputs = call.inputs, first = item * kSlice;
  const float* by = input<float>(call.by);
  std::uint8_t* panel = output<std::uint8_t>(call.panels, first * inputs);
  std::int8_t* codes = output<std::int8_t>(call.scratch, first / kSlice * inputs);
  for (Count r = 0; r < kSlice; ++r) {
    const Count o = first + r;
    *output<float>(call.scales, o) = round_row(input<float>(call.weight, o * call.stride), by, inputs, false, codes);
    for (Count i = 0; i < inputs; i += kQuad) {
      std::uint32_t word;
      std::memcpy(&word, codes + i, sizeof word);
      word ^= 0x80808080u;
      std::memcpy(panel + i / kQuad * kLine + r * kQuad, &word, sizeof word);
    }
  }
}

void int8_turned(const Int8Turned& call, Count item) {
  const Count column = item * kSlice;
  std::uint8_t* to = output<std::uint8_t>(call.panels, column * call.rows);
  if (call.codes) {
    for (Count t = 0; t < call.rows; t += kQuad)
      interleave_quad(input<std::int8_t>(call.codes, t * call.stride + column), call.stride, 128, to + t * kSlice);
    return;
  }
  const float* x = input<float>(call.input, column);
  const float* by = input<float>(call.by);
  float* scales = output<float>(call.scales, column);
  std::int32_t* sums = output<std::int32_t>(call.sums, column);
  Floats inverse[kVectors];
  Ints most[kVectors] = {}, totals[kVectors] = {};
  for (Count t = 0; t < call.rows; ++t)
    for (Count v = 0; v < kVectors; ++v) most[v] = larger(most[v], magnitude(load(x + t * call.stride + v * W) * by[t]));
  for (Count v = 0; v < kVectors; ++v) {
    const Floats scale = (Floats)most[v] / 127.0f;
    store(scales + v * W, scale);
    inverse[v] = scale > 0.0f ? 1.0f / scale : Floats{};
  }
  std::int8_t four[kQuad * kSlice];
  for (Count t = 0; t < call.rows; t += kQuad) {
    for (Count r = 0; r < kQuad; ++r)
      for (Count v = 0; v < kVectors; ++v) {
        const Ints codes = rounded(load(x + (t + r) * call.stride + v * W) * by[t + r] * inverse[v]);
        totals[v] += codes;
        store(four + r * kSlice + v * W, codes);
      }
    interleave_quad(four, kSlice, call.weights ? 128 : 0, to + t * kSlice);
  }
  for (Count v = 0; v < kVectors; ++v) std::memcpy(sums + v * W, &totals[v], sizeof totals[v]);
}

Count int8_product_items(const Int8Product& call) {
  return (call.rows + kRowsOfProduct - 1) / kRowsOfProduct * (call.columns / kSlice);
}

#if defined(__AVX2__) && !defined(__AVX512F__) && !defined(MAR_AVXVNNI)

void int8_product(const Int8Product& call, Count item) {
  const Count slices = call.columns / kSlice, column = item % slices * kSlice, begin = item / slices * kRowsOfProduct;
  const Count rows = begin + kRowsOfProduct < call.rows ? kRowsOfProduct : call.rows - begin;
  Part part;
  std::memset(part.sums, 0, sizeof(std::int32_t) * static_cast<std::size_t>(rows * kSlice));
  for (Count k = 0; k < call.inner; k += kDeep) {
    const Count quads = (k + kDeep < call.inner ? kDeep : call.inner - k) / kQuad;
    widen_panel(input<std::uint8_t>(call.panels, column * call.inner + k * kSlice), quads, part.weights);
    for (Count m = 0; m < rows;) {
      const Count at = begin + m;
      const Count place = call.turned ? at / kSlice * kSlice * call.inner + k * kSlice + at % kSlice * kQuad
                                      : at * call.inner + k;
      const std::int8_t* codes = input<std::int8_t>(call.codes, place);
      // Not over the end of a panel, whose rows are not where the next one's are.
      const Count panel = kSlice - at % kSlice, left = call.turned && panel < rows - m ? panel : rows - m;
#define MAR_ROWS(M) add_rows<M>(call, part, codes, quads, part.sums + m * kSlice), m += M
      if (left >= 6) {
        MAR_ROWS(6);
      } else if (left >= 2) {
        MAR_ROWS(2);
      } else {
        MAR_ROWS(1);
      }
#undef MAR_ROWS
    }
  }
  const float* column_scales = input<float>(call.column_scales, column);
  for (Count m = 0; m < rows; ++m) {
    const float scale = *input<float>(call.scales, begin + m);
    const std::int32_t less = 128 * *input<std::int32_t>(call.sums, begin + m);
    float* out = output<float>(call.out, (begin + m) * call.stride + column);
    for (Count v = 0; v < kSlice; v += W) {
      Ints sums;
      std::memcpy(&sums, part.sums + m * kSlice + v, sizeof sums);
      store(out + v, __builtin_convertvector(sums - less, Floats) * (load(column_scales + v) * scale));
    }
  }
}

#else

void int8_product(const Int8Product& call, Count item) {
  const Count slices = call.columns / kSlice, quads = call.inner / kQuad;
  const Count column = item % slices * kSlice, begin = item / slices * kRowsOfProduct;
  const Count end = begin + kRowsOfProduct < call.rows ? begin + kRowsOfProduct : call.rows;
  const std::uint8_t* panel = input<std::uint8_t>(call.panels, column * call.inner);
  const float* column_scales = input<float>(call.column_scales, column);
  const Count row = call.turned ? kQuad : call.inner, quad = call.turned ? kLine : kQuad;
  for (Count m = begin; m < end;) {
    const Count place = call.turned ? m / kSlice * kSlice * call.inner + m % kSlice * kQuad : m * call.inner;
    const std::int8_t* codes = input<std::int8_t>(call.codes, place);
    const float* scales = input<float>(call.scales, m);
    const std::int32_t* sums = input<std::int32_t>(call.sums, m);
    float* out = output<float>(call.out, m * call.stride + column);
    // Not over the end of a panel, whose rows are not where the next one's are.
    const Count panel_end = m / kSlice * kSlice + kSlice, left = (call.turned && panel_end < end ? panel_end : end) - m;
#define MAR_TILE(M) \
  tile<M>(codes, row, quad, panel, quads, scales, sums, column_scales, out, call.stride), m += M
    if (left >= 12) {
      MAR_TILE(12);
    } else if (left >= 8) {
      MAR_TILE(8);
    } else if (left >= 4) {
      MAR_TILE(4);
    } else {
      MAR_TILE(1);
    }
#undef MAR_TILE
  }
}

#endif

}  // namespace mar::MAR_VARIANT
