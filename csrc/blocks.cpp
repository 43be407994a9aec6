// Many tokens through a linear: dense products of their values or codes with a block of weights. Compiled once per
// instruction set. Does: bring weights into the order of the multiplying instruction, once for all tokens. Does not:
// skip anything that is zero (rows.cpp does).
#include "avx2.hpp"
#include "engine_kernels.hpp"
#include "engine_vectors.hpp"

namespace mar::MAR_VARIANT {

void block_f32(Block block, int inputs, const float* values, int tokens, float* out, std::size_t out_stride,
               std::uint8_t*) {
  const float* weights = reinterpret_cast<const float*>(block.rows);
  for (int s = 0; s < block.slices; ++s)
    product(values, inputs, weights + s * kSlice, block.stride / 4, inputs, tokens, out + s * kSlice, out_stride,
            false);
}

#if defined(__AVX512BF16__)

namespace {

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

}  // namespace

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
      MAR_TILES(0, 6, 2, MAR_CALL)
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
      for (int v = 0; v < kParts; ++v) store(weights + i * kSlice + v * kLanes, bf16_to_float(row + v * kLanes));
    }
    product(values, inputs, weights, kSlice, inputs, tokens, out + s * kSlice, out_stride, false);
  }
}

#endif

#if defined(__AVX512VNNI__)

namespace {

// Weights are multiplied in halves of a slice: a half of 600 inputs stays in the first-level cache, and with two vectors
// of outputs 12 tokens' sums stay in registers.
constexpr int kHalf = 2;
constexpr int kHalfLine = kHalf * 64;

// A quad of rows of a slice, each output's four bytes side by side, to the place of each half.
inline void store_quad(__m512i mixed[4], std::uint8_t* halves, int quads, int quad) {
  __m512i ordered[4];
  in_order(mixed[0], mixed[1], mixed[2], mixed[3], ordered);
  for (int v = 0; v < 4; ++v) store(halves + ((v / kHalf * quads + quad) * kHalf + v % kHalf) * 64, ordered[v]);
}

// Sums come back by value: GCC 12 keeps what it is given by address in memory, and writes it there in every turn.
template <int M>
struct Sums {
  I of[M][kHalf];
};

template <int M>
inline Sums<M> dots(const std::int8_t* codes, std::size_t stride, const std::uint8_t* weights, int quads) {
  Sums<M> sums = {};
  for (int i = 0; i < quads; ++i) {
    __m512i w[kHalf];
    for (int v = 0; v < kHalf; ++v) w[v] = load<__m512i>(weights + i * kHalfLine + v * 64);
    for (int m = 0; m < M; ++m) {
      std::int32_t four;
      std::memcpy(&four, codes + m * stride + 4 * i, 4);
      const __m512i x = _mm512_set1_epi32(four);
      for (int v = 0; v < kHalf; ++v) sums.of[m][v] = (I)_mm512_dpbusd_epi32((__m512i)sums.of[m][v], w[v], x);
    }
  }
  return sums;
}

#if defined(__AMX_INT8__)

// AMX multiplies 16 tokens' codes, 64 each, by 16 quads of 16 outputs; eight registers hold two by two such tiles.
constexpr int kSide = 16;
constexpr int kMost = 2 * kSide;       // tokens
constexpr int kDeep = kSide * kQuad;   // inputs

struct alignas(64) Shapes {
  std::uint8_t palette, start, reserved[14];
  std::uint16_t bytes[16];
  std::uint8_t rows[16];
};
// Constant: GCC 12 does not know that the instruction reads all of it.
constexpr Shapes kShapes = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// Registers have these shapes for as long as this lives; it says for how many tokens they can be used.
struct Tiles {
  int tokens;
  Tiles(int inputs, int tokens) : tokens(inputs % kDeep ? 0 : tokens / kMost * kMost) { _tile_loadconfig(&kShapes); }
  ~Tiles() { _tile_release(); }
};

template <>
inline Sums<kMost> dots<kMost>(const std::int8_t* codes, std::size_t stride, const std::uint8_t* weights, int quads) {
  Sums<kMost> sums;
  const std::int8_t* low = codes + kSide * stride;
  asm volatile("" ::: "memory");  // GCC 12 does not know either that tiles are loaded from what was just written
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int i = 0; i < quads; i += kSide) {
    _tile_loadd(4, codes + i * kQuad, stride);
    _tile_loadd(6, weights + i * kHalfLine, kHalfLine);
    _tile_loadd(7, weights + i * kHalfLine + 64, kHalfLine);
    _tile_loadd(5, low + i * kQuad, stride);
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
    _tile_dpbsud(2, 5, 6);
    _tile_dpbsud(3, 5, 7);
  }
  _tile_stored(0, &sums.of[0][0], sizeof sums.of[0]);
  _tile_stored(1, &sums.of[0][1], sizeof sums.of[0]);
  _tile_stored(2, &sums.of[kSide][0], sizeof sums.of[0]);
  _tile_stored(3, &sums.of[kSide][1], sizeof sums.of[0]);
  return sums;
}

#define MAR_BY_TILES(call) \
  for (int m = 0; m < tiles.tokens; m += kMost) call(kMost);

#else

struct Tiles {
  static constexpr int tokens = 0;
  Tiles(int, int) {}
};
#define MAR_BY_TILES(call)

#endif

template <int M>
inline void tile_i8(const std::int8_t* codes, std::size_t stride, const std::uint8_t* weights, int quads,
                    const float* scales, const std::int32_t* sums, const float* token_scales, float* out,
                    std::size_t out_stride) {
  const Sums<M> found = dots<M>(codes, stride, weights, quads);
  for (int m = 0; m < M; ++m) {
    const float factor = token_scales ? token_scales[m] : 1.0f;
    for (int v = 0; v < kHalf; ++v) {
      const F total = to_float(found.of[m][v] - 128 * sums[m]);
      store(out + m * out_stride + v * kLanes, total * (load<F>(scales + v * kLanes) * factor));
    }
  }
}

}  // namespace

void block_i8(Block block, int inputs, const float* scales, const std::int8_t* codes, const std::int32_t* sums,
              const float* token_scales, int tokens, float* out, std::size_t out_stride, std::uint8_t* scratch) {
  const int quads = inputs / kQuad;
  const Tiles tiles(inputs, tokens);
  for (int s = 0; s < block.slices; ++s) {
    for (int i = 0; i < quads; ++i) {
      const std::uint8_t* row = block.rows + block.stride * kQuad * i + s * kSlice;
      __m512i mixed[4];
      interleave(load<__m512i>(row), load<__m512i>(row + block.stride), load<__m512i>(row + 2 * block.stride),
                 load<__m512i>(row + 3 * block.stride), mixed);
      store_quad(mixed, scratch, quads, i);
    }
    for (int half = 0; half < 2; ++half) {
      const std::uint8_t* weights = scratch + half * quads * kHalfLine;
      const int column = s * kSlice + half * kHalf * kLanes;
#define MAR_CALL(M)                                                                                                \
  tile_i8<M>(codes + static_cast<std::size_t>(m) * inputs, inputs, weights, quads, scales + column, sums + m,      \
             token_scales ? token_scales + m : nullptr, out + m * out_stride + column, out_stride)
      MAR_BY_TILES(MAR_CALL)
      MAR_TILES(tiles.tokens, 12, 4, MAR_CALL)
#undef MAR_CALL
    }
  }
}

namespace {

// scales: fp32, of each group 64.
template <int M>
inline void tile_i4(const std::int8_t* codes, std::size_t stride, const std::uint8_t* weights, int quads,
                    const float* scales, const std::int32_t* sums, int groups, const float* token_scales, float* out,
                    std::size_t out_stride) {
  F totals[M][kHalf] = {};
  for (int g = 0; g < groups; ++g) {
    constexpr int kQuads = kGroup / kQuad;
    const Sums<M> found =
        dots<M>(codes + g * kGroup, stride, weights + g * kQuads * kHalfLine, std::min(kQuads, quads - g * kQuads));
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < kHalf; ++v)
        totals[m][v] += to_float(found.of[m][v] - 8 * sums[m * groups + g]) * load<F>(scales + g * kSlice + v * kLanes);
  }
  for (int m = 0; m < M; ++m) {
    const float factor = token_scales ? token_scales[m] : 1.0f;
    for (int v = 0; v < kHalf; ++v) store(out + m * out_stride + v * kLanes, totals[m][v] * factor);
  }
}

}  // namespace

void block_i4(Block block, int inputs, const std::uint16_t* scales, std::size_t scale_stride, const std::int8_t* codes,
              const std::int32_t* sums, const float* token_scales, int tokens, float* out, std::size_t out_stride,
              std::uint8_t* scratch) {
  const int quads = inputs / kQuad, groups = (inputs + kGroup - 1) / kGroup;
  const __m512i low_half = _mm512_set1_epi8(15);
  const Tiles tiles(inputs, tokens);
  for (int s = 0; s < block.slices; ++s) {
    // A line holds two slices: the even one in its low nibbles, the odd one in its high ones.
    for (int i = 0; i < quads; ++i) {
      const std::uint8_t* row = block.rows + block.stride * kQuad * i + s / 2 * kSlice;
      __m512i mixed[4];
      interleave(load<__m512i>(row), load<__m512i>(row + block.stride), load<__m512i>(row + 2 * block.stride),
                 load<__m512i>(row + 3 * block.stride), mixed);
      for (auto& one : mixed) one = _mm512_and_si512(s % 2 ? _mm512_srli_epi16(one, 4) : one, low_half);
      store_quad(mixed, scratch, quads, i);
    }
    float* floats = reinterpret_cast<float*>(scratch + static_cast<std::size_t>(quads) * 256);
    for (int g = 0; g < groups; ++g) {
      __m512i parts[4], ordered[4];
      for (int v = 0; v < 4; ++v) {
        const __m512i pairs = load<__m512i>(scales + g * scale_stride + s / 2 * 2 * kSlice + v * 2 * kLanes);
        const __m512i odd = _mm512_andnot_si512(_mm512_set1_epi32(0xffff), pairs);
        parts[v] = s % 2 ? odd : _mm512_slli_epi32(pairs, 16);
      }
      in_order(parts[0], parts[1], parts[2], parts[3], ordered);
      for (int v = 0; v < 4; ++v) store(floats + g * kSlice + v * kLanes, ordered[v]);
    }
    for (int half = 0; half < 2; ++half) {
      const std::uint8_t* weights = scratch + half * quads * kHalfLine;
      const int column = half * kHalf * kLanes;
#define MAR_CALL(M)                                                                                              \
  tile_i4<M>(codes + static_cast<std::size_t>(m) * inputs, inputs, weights, quads, floats + column,              \
             sums + static_cast<std::size_t>(m) * groups, groups, token_scales ? token_scales + m : nullptr,     \
             out + m * out_stride + s * kSlice + column, out_stride)
      MAR_BY_TILES(MAR_CALL)
      MAR_TILES(tiles.tokens, 6, 4, MAR_CALL)
#undef MAR_CALL
    }
  }
}

#elif defined(__AVX2__)

namespace {

// Weights are multiplied in quarters of a slice: two vectors of 8 outputs, of which 6 tokens' sums stay in registers.
constexpr int kEight = 8;
constexpr int kQuarter = 2 * kEight;
constexpr int kQuarters = kSlice / kQuarter;

template <int M>
struct Sums {
  __m256i of[M][2];
};

constexpr int kQuads = kGroup / kQuad;
constexpr int kLine = kQuarter * kQuad;  // of four inputs, an output's side by side
constexpr int kTokens = 256;  // whose starts are kept

// Integer sums to floats, each times its output's scale and the token's.
inline void store_scaled(__m256i sums, std::int32_t less, const float* scales, float factor, float* out) {
  const __m256 total = _mm256_cvtepi32_ps(_mm256_sub_epi32(sums, _mm256_set1_epi32(less)));
  store(out, total * (load<__m256>(scales) * factor));
}

// Sums plus four bytes times four codes of every output: in one of 32 bits, or in two of 16, of two products each.
inline __m256i plus_quads(__m256i sums, __m256i bytes, __m256i codes) {
#if defined(MAR_AVXVNNI)
  return plus_dots(sums, bytes, codes);
#else
  return plus_16(sums, _mm256_maddubs_epi16(bytes, codes));
#endif
}

// Of M tokens; a token's sums begin with starts[m * apart].
template <int M>
inline Sums<M> dots_of(const std::int8_t* codes, std::size_t stride, const std::uint8_t* weights, int quads,
                       const std::int32_t* starts, int apart) {
  Sums<M> sums;
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m) sums.of[m][0] = sums.of[m][1] = _mm256_set1_epi32(starts[m * apart]);
  for (int i = 0; i < quads; ++i) {
    const __m256i w[2] = {load<__m256i>(weights + i * kLine), load<__m256i>(weights + i * kLine + kLine / 2)};
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) {
      const __m256i x = four_bytes(codes + m * stride + i * kQuad);
      sums.of[m][0] = plus_quads(sums.of[m][0], w[0], x);
      sums.of[m][1] = plus_quads(sums.of[m][1], w[1], x);
    }
  }
  return sums;
}

#if defined(MAR_AVXVNNI)

inline __m256i whole(__m256i sums) { return sums; }

// What a group's sums start from: nibbles stand for themselves less 8.
inline std::int32_t start_of(const std::int8_t* codes, int count) {
  std::int32_t sum = 0;
  for (int i = 0; i < count; ++i) sum += codes[i];
  return -8 * sum;
}

// M tokens by a quarter of a slice.
template <int M>
inline void tile_i8(const std::int8_t* codes, int inputs, const std::uint8_t* weights, const float* scales,
                    const std::int32_t* sums, const float* token_scales, float* out, std::size_t out_stride) {
  constexpr std::int32_t none = 0;
  const Sums<M> found = dots_of<M>(codes, inputs, weights, inputs / kQuad, &none, 0);
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v)
      store_scaled(found.of[m][v], 128 * sums[m], scales + v * kEight, token_scales ? token_scales[m] : 1.0f,
                   out + m * out_stride + v * kEight);
}

}  // namespace

void block_i8(Block block, int inputs, const float* scales, const std::int8_t* codes, const std::int32_t* sums,
              const float* token_scales, int tokens, float* out, std::size_t out_stride, std::uint8_t* scratch) {
  for (int column = 0; column < block.slices * kSlice; column += kQuarter) {
    for (int i = 0; i < inputs; i += kQuad) {
      __m128i rows[kQuad];
      for (int r = 0; r < kQuad; ++r) rows[r] = load<__m128i>(block.rows + block.stride * (i + r) + column);
      store_quad(rows, scratch + i / kQuad * kLine);
    }
#define MAR_CALL(M)                                                                                        \
  tile_i8<M>(codes + static_cast<std::size_t>(m) * inputs, inputs, scratch, scales + column, sums + m,     \
             token_scales ? token_scales + m : nullptr, out + m * out_stride + column, out_stride)
    MAR_TILES(0, 6, 2, MAR_CALL)
#undef MAR_CALL
  }
}

namespace {

#else

// Pairs of inputs in 16 bits: 255 times 127 is too much for the pairs of bytes that AVX2 adds up in 16.
template <int M>
inline Sums<M> dots_i8(const std::int16_t* codes, std::size_t stride, const std::int16_t* weights, int pairs) {
  Sums<M> sums = {};
  for (int i = 0; i < pairs; ++i) {
    const __m256i w[2] = {load<__m256i>(weights + 2 * i * kQuarter), load<__m256i>(weights + (2 * i + 1) * kQuarter)};
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) {
      const __m256i x = four_bytes(codes + m * stride + 2 * i);
      sums.of[m][0] = plus_32(sums.of[m][0], _mm256_madd_epi16(w[0], x));
      sums.of[m][1] = plus_32(sums.of[m][1], _mm256_madd_epi16(w[1], x));
    }
  }
  return sums;
}

inline void widen(const std::int8_t* from, int count, std::int16_t* to) {
  int i = 0;
  for (; i + 16 <= count; i += 16) store(to + i, _mm256_cvtepi8_epi16(load<__m128i>(from + i)));
  for (; i < count; ++i) to[i] = from[i];
}

// M tokens by a slice, whose quarters lie one after the other. `wide`: room for the tokens' codes.
template <int M>
inline void tile_i8(const std::int8_t* codes, int inputs, const std::int16_t* weights, std::int16_t* wide,
                    const float* scales, const std::int32_t* sums, const float* token_scales, float* out,
                    std::size_t out_stride) {
  widen(codes, M * inputs, wide);
  for (int q = 0; q < kQuarters; ++q) {
    const Sums<M> found = dots_i8<M>(wide, inputs, weights + q * inputs * kQuarter, inputs / 2);
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        const int column = q * kQuarter + v * kEight;
        store_scaled(found.of[m][v], 128 * sums[m], scales + column, token_scales ? token_scales[m] : 1.0f,
                     out + m * out_stride + column);
      }
  }
}

}  // namespace

void block_i8(Block block, int inputs, const float* scales, const std::int8_t* codes, const std::int32_t* sums,
              const float* token_scales, int tokens, float* out, std::size_t out_stride, std::uint8_t* scratch) {
  auto* weights = reinterpret_cast<std::int16_t*>(scratch);
  std::int16_t* wide = weights + inputs * kSlice;
  for (int s = 0; s < block.slices; ++s) {
    for (int i = 0; i < inputs; i += 2)
      for (int q = 0; q < kQuarters; ++q) {
        const std::uint8_t* row = block.rows + block.stride * i + s * kSlice + q * kQuarter;
        const __m128i even = load<__m128i>(row), odd = load<__m128i>(row + block.stride);
        std::int16_t* to = weights + (q * inputs + i) * kQuarter;
        store(to, _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(even, odd)));
        store(to + kQuarter, _mm256_cvtepu8_epi16(_mm_unpackhi_epi8(even, odd)));
      }
#define MAR_CALL(M)                                                                                                  \
  tile_i8<M>(codes + static_cast<std::size_t>(m) * inputs, inputs, weights, wide, scales + s * kSlice, sums + m,     \
             token_scales ? token_scales + m : nullptr, out + m * out_stride + s * kSlice, out_stride)
    MAR_TILES(0, 6, 2, MAR_CALL)
#undef MAR_CALL
  }
}

namespace {

// What a group's two 16-bit sums start from: -8 times the codes that each of them takes, two of every four. Sums are taken
// modulo 2^16 and are right in the end, as 32 codes of 127 times nibbles less 8 fit 16 bits.
inline std::int32_t start_of(const std::int8_t* codes, int count) {
  std::int8_t whole[kGroup] = {};
  std::memcpy(whole, codes, count);
  const __m256i ones = _mm256_set1_epi8(1);
  const __m256i twos = _mm256_add_epi16(_mm256_maddubs_epi16(ones, load<__m256i>(whole)),
                                        _mm256_maddubs_epi16(ones, load<__m256i>(whole + kGroup / 2)));
  __m128i sums = _mm_add_epi16(_mm256_castsi256_si128(twos), _mm256_extracti128_si256(twos, 1));
  sums = _mm_add_epi16(sums, _mm_shuffle_epi32(sums, 0x4e));
  sums = _mm_add_epi16(sums, _mm_shuffle_epi32(sums, 0xb1));
  return _mm_cvtsi128_si32(_mm_sub_epi16(_mm_setzero_si128(), _mm_slli_epi16(sums, 3)));
}

// A group's two sums of every output to one.
inline __m256i whole(__m256i sums) { return _mm256_madd_epi16(sums, _mm256_set1_epi16(1)); }

#endif

// scales: fp32, of each group 64.
template <int M>
inline void tile_i4(const std::int8_t* codes, std::size_t stride, const std::uint8_t* weights, int quads,
                    const float* scales, const std::int32_t* starts, int groups, const float* token_scales, float* out,
                    std::size_t out_stride) {
  __m256 totals[M][2] = {};
  for (int g = 0; g < groups; ++g) {
    const Sums<M> found = dots_of<M>(codes + g * kGroup, stride, weights + g * kQuads * kLine,
                                     std::min(kQuads, quads - g * kQuads), starts + g, groups);
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v)
        totals[m][v] += _mm256_cvtepi32_ps(whole(found.of[m][v])) *
                        load<__m256>(scales + g * kSlice + v * kEight);
  }
  for (int m = 0; m < M; ++m) {
    const float factor = token_scales ? token_scales[m] : 1.0f;
    for (int v = 0; v < 2; ++v) store(out + m * out_stride + v * kEight, totals[m][v] * factor);
  }
}

// Up to kTokens tokens; scratch: of block_i4.
inline void some_i4(Block block, int inputs, const std::uint16_t* scales, std::size_t scale_stride,
                    const std::int8_t* codes, const float* token_scales, int tokens, float* out,
                    std::size_t out_stride, std::uint8_t* scratch) {
  const int quads = inputs / kQuad, groups = (inputs + kGroup - 1) / kGroup;
  const __m128i low_half = _mm_set1_epi8(15);
  float* floats = reinterpret_cast<float*>(scratch + static_cast<std::size_t>(inputs) * kSlice);
  auto* starts = reinterpret_cast<std::int32_t*>(floats + groups * kSlice);
  for (int m = 0; m < tokens; ++m)
    for (int g = 0; g < groups; ++g)
      starts[m * groups + g] = start_of(codes + static_cast<std::size_t>(m) * inputs + g * kGroup,
                                        std::min(kGroup, inputs - g * kGroup));
  for (int s = 0; s < block.slices; ++s) {
    // A line holds two slices: the even one in its low nibbles, the odd one in its high ones.
    for (int i = 0; i < quads; ++i)
      for (int q = 0; q < kQuarters; ++q) {
        __m128i rows[kQuad];
        for (int r = 0; r < kQuad; ++r) {
          rows[r] = load<__m128i>(block.rows + block.stride * (kQuad * i + r) + s / 2 * kSlice + q * kQuarter);
          rows[r] = _mm_and_si128(s % 2 ? _mm_srli_epi16(rows[r], 4) : rows[r], low_half);
        }
        store_quad(rows, scratch + (q * quads + i) * kLine);
      }
    for (int g = 0; g < groups; ++g)
      for (int j = 0; j < kSlice; ++j)
        floats[g * kSlice + j] = bf16_to_float(scales[g * scale_stride + s / 2 * 2 * kSlice + scale_place(s % 2 * kSlice + j)]);
    for (int q = 0; q < kQuarters; ++q) {
#define MAR_CALL(M)                                                                                                  \
  tile_i4<M>(codes + static_cast<std::size_t>(m) * inputs, inputs, scratch + q * quads * kLine, quads,               \
             floats + q * kQuarter, starts + m * groups, groups,                                                     \
             token_scales ? token_scales + m : nullptr, out + m * out_stride + s * kSlice + q * kQuarter, out_stride)
      MAR_TILES(0, 4, 2, MAR_CALL)
#undef MAR_CALL
    }
  }
}

}  // namespace

void block_i4(Block block, int inputs, const std::uint16_t* scales, std::size_t scale_stride, const std::int8_t* codes,
              const std::int32_t*, const float* token_scales, int tokens, float* out, std::size_t out_stride,
              std::uint8_t* scratch) {
  for (int m = 0; m < tokens; m += kTokens)
    some_i4(block, inputs, scales, scale_stride, codes + static_cast<std::size_t>(m) * inputs,
            token_scales ? token_scales + m : nullptr, std::min(kTokens, tokens - m), out + m * out_stride, out_stride,
            scratch);
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

}  // namespace mar::MAR_VARIANT
