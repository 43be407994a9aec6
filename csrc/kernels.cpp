// The engine's table, and those of its kernels that take a vector of values: norms, encoders, gates.
// Does not: multiply by weights (rows.cpp for one token, blocks.cpp for many) or run a mixer's head (head.cpp).
// Compiled once per instruction set (MAR_VARIANT). Vector types carry most of the engine to every set; only the integer
// products are written by hand for AVX2 and AVX-512.
#include "avx2.hpp"
#include "engine_kernels.hpp"
#include "engine_vectors.hpp"

#include <limits>

namespace mar::MAR_VARIANT {
namespace {

using Bytes = std::int8_t __attribute__((vector_size(kLanes)));

inline void store_codes(std::int8_t* to, I codes) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  store_bytes(_mm256_max_epi32((__m256i)codes, _mm256_set1_epi32(-127)), to);  // NaN's code too is one that rows take
#else
  store(to, __builtin_convertvector(codes, Bytes));
#endif
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

inline I codes_of(F x, F threshold, Encoder encoder) {
  // The sign is put on the product as bits, so that no compiler fuses product and sum: torch rounds twice.
  const F charge = (F)((I)(threshold * encoder.precharge) | ((I)x & std::numeric_limits<std::int32_t>::min()));
  // Clamped one beyond the codes first, so that the conversion stays in its range.
  const F v = least(most((x + charge) / threshold, splat(encoder.low - 1.0f)), splat(encoder.high + 1.0f));
  const I code = to_int(v);
  const I low = I{} + encoder.low, high = I{} + encoder.high;
  const I raised = code < low ? low : code;
  return raised > high ? high : raised;
}

void encode(const float* x, const float* threshold, int n, Encoder encoder, std::int8_t* codes) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes)
    store_codes(codes + i, codes_of(load<F>(x + i), load<F>(threshold + i), encoder));
  if (i < n) {
    const I code = codes_of(load_some(x + i, n - i), load_some(threshold + i, n - i), encoder);
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
    store_codes(codes + i, to_int(nearest(load<F>(x + i) * factor)));
  for (; i < n; ++i) codes[i] = static_cast<std::int8_t>(std::nearbyint(x[i] * factor));
  return scale;
}

// GCC 12 converts 8 bits to floats one by one.
inline F bytes_to_float(const std::int8_t* from) {
#if defined(__AVX512F__)
  return (F)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load<__m128i>(from)));
#elif defined(__AVX2__)
  return (F)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
  return __builtin_convertvector(load<Bytes>(from), F);
#endif
}

float dot_i8(const float* x, const std::int8_t* y, int n) {
  F sums[2] = {};
  int i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes)
    for (int v = 0; v < 2; ++v)
      sums[v] += load<F>(x + i + v * kLanes) * bytes_to_float(y + i + v * kLanes);
  float total = sum(sums[0] + sums[1]);
  for (; i < n; ++i) total += x[i] * y[i];
  return total;
}

#if defined(__AVX2__)

// Of eight places, those of the bits that are set, in order.
struct Places {
  std::uint8_t of[256][8] = {};
  constexpr Places() {
    for (int bits = 0; bits < 256; ++bits)
      for (int i = 0, count = 0; i < 8; ++i)
        if (bits >> i & 1) of[bits][count++] = static_cast<std::uint8_t>(i);
  }
};
constexpr Places kPlaces;

#endif

// Nothing is branched on: codes are too random to be guessed.
int list_nonzero(const std::int8_t* codes, int first, int last, std::int32_t* index, std::int8_t* listed) {
  std::ptrdiff_t count = 0;
  int i = first;
#if defined(__AVX2__)
  for (; i + 8 <= last; i += 8) {
    const __m128i eight = _mm_loadl_epi64((const __m128i*)(codes + i));
    const int bits = ~_mm_movemask_epi8(_mm_cmpeq_epi8(eight, _mm_setzero_si128())) & 255;
    const __m128i places = _mm_loadl_epi64((const __m128i*)kPlaces.of[bits]);
    _mm_storel_epi64((__m128i*)(listed + count), _mm_shuffle_epi8(eight, places));
    store(index + count, _mm256_add_epi32(_mm256_cvtepu8_epi32(places), _mm256_set1_epi32(i)));
    count += _mm_popcnt_u32(bits);
  }
#endif
  for (; i < last; ++i) {
    index[count] = i;
    listed[count] = codes[i];
    count += codes[i] != 0;
  }
  return static_cast<int>(count);
}

void add(const float* x, int n, float* y) {
  for (int i = 0; i < n; ++i) y[i] += x[i];
}

// Longer pieces of rows come faster from memory, while their sums, wider in int4 with AVX-512, fit the first-level cache:
// with AVX-512 of a Zen 5 (48 KB), with AVX2 of a Zen 3 (docs/lab-log.md).
#if defined(__AVX512F__)
constexpr int kPanel = 64;
#elif defined(__AVX2__)
constexpr int kPanel = 128;
#else
constexpr int kPanel = 18;
#endif

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {kPanel, rms_norm, encode,   quantise,  list_nonzero, dot,        dot_i8,   add,      gated,     rows_f32,
                         rows_bf16, rows_i8, rows_i4,   stream_i4,    block_f32,  block_bf16, block_i8, block_i4, head_step,
                         head_scan, head_window};

}  // namespace mar::MAR_VARIANT
