// int8 matrix products for training: what is multiplied is rounded to 8 bits, sums are exact, results are fp32.
// Compiled once per instruction set. Does: round rows and columns, each with a scale of its own; bring weights, activations
// and gradients into the order of the multiplying instruction; multiply. Does not: keep anything from call to call.
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
typedef std::int8_t Bytes __attribute__((vector_size(W)));
inline void store(std::int8_t* to, Ints v) {
  const Bytes bytes = __builtin_convertvector(v, Bytes);
  std::memcpy(to, &bytes, sizeof bytes);
}

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
  for (Count n = 0; n < kSlice; ++n)
    for (Count j = 0; j < kQuad; ++j)
      to[n * kQuad + j] = static_cast<std::uint8_t>(rows[j * stride + n]) ^ plus;  // + 128 is a change of the top bit
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

}  // namespace mar::MAR_VARIANT
