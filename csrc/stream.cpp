// One token through a linear in int4 whose input asks for most rows, and through the head's rough form: all weights, in the
// order of the multiplying instruction. Compiled once per instruction set. Does: multiply groups of codes. Does not: skip
// zeros (rows.cpp does).
#include "avx2.hpp"
#include "engine_kernels.hpp"
#include "engine_vectors.hpp"

namespace mar::MAR_VARIANT {
namespace {

// How far ahead weights are called in, in bytes: the hardware's own calls end at a page, before what this takes to come.
// Measured with AVX-512 on a Zen 5, whose two halves are apart, without on a Zen 3.
#if defined(__AVX512VNNI__)
constexpr int kAhead = 4096;
#else
constexpr int kAhead = 2048;
#endif

constexpr int kHalf = kSlice / 2;               // outputs of each of two slices that lie together
constexpr int kLines = kQuad * kHalf;           // bytes of one quad of inputs and a half
constexpr int kQuads = kGroup / kQuad;

inline const std::uint8_t* lines_of(Stream stream, Piece piece, int pair, int half) {
  const std::size_t halves = 2 * static_cast<std::size_t>(piece.pair + pair) + half;
  return stream.weights + (halves * stream.quads + piece.group * kQuads) * kLines;
}
inline const std::uint16_t* scales_of(Stream stream, Piece piece, int pair) {
  return stream.scales + (static_cast<std::size_t>(piece.pair + pair) * stream.groups() + piece.group) * 2 * kSlice;
}
inline int quads_of(Stream stream, int group) { return std::min(kQuads, stream.quads - group * kQuads); }

}  // namespace

#if defined(__AVX512VNNI__)

// Both halves side by side, for sums enough to keep the multiplier busy. Bytes as they are give the sums of both nibbles at
// once, the high one's sixteen times; nibbles left high give that one alone.
void stream_i4(Stream stream, Piece piece, const std::int8_t* codes, const std::int32_t* sums, float* out) {
  const __m512i low_half = _mm512_set1_epi8(15);
  for (int pair = 0; pair < piece.pairs; ++pair, out += 2 * kSlice) {
    const std::uint8_t* lines[2] = {lines_of(stream, piece, pair, 0), lines_of(stream, piece, pair, 1)};
    const std::uint16_t* scales = scales_of(stream, piece, pair);
    F totals[8] = {};
    for (int group = 0; group < piece.groups; ++group, scales += 2 * kSlice) {
      __m512i sum[8];
      for (auto& one : sum) one = _mm512_setzero_si512();
      const std::int8_t* code = codes + group * kGroup;
      for (int quad = quads_of(stream, piece.group + group); quad > 0; --quad, code += kQuad) {
        std::int32_t word;
        std::memcpy(&word, code, sizeof word);
        const __m512i four = _mm512_set1_epi32(word);
        for (int k = 0; k < 4; ++k) {
          const std::uint8_t* line = lines[k / 2] + k % 2 * 64;
          __builtin_prefetch(line + kAhead, 0, 3);
          const __m512i both = load<__m512i>(line);
          sum[k] = _mm512_dpbusd_epi32(sum[k], both, four);
          sum[4 + k] = _mm512_dpbusd_epi32(sum[4 + k], _mm512_andnot_si512(low_half, both), four);
        }
        for (auto& line : lines) line += kLines;
      }
      for (int k = 0; k < 8; ++k)
        totals[k] += to_float((k < 4 ? (I)sum[k] - (I)sum[4 + k] : (I)sum[k] >> 4) - 8 * sums[group]) *
                     bf16_to_float(scales + k * kLanes);
    }
    for (int k = 0; k < 8; ++k) store(out + k * kLanes, totals[k]);
  }
}

#elif defined(__AVX2__)

namespace {

constexpr int kBytes = 32;  // of a register

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

// Bytes are multiplied and added two by two, to 16 bits, which 15 times 127 twice fits; to these sums others are added modulo
// 2^16. A sum takes 32 of a group's inputs, and a nibble less 8 is within 8: with codes of 127 that is 32,512.
void stream_i4(Stream stream, Piece piece, const std::int8_t* codes, const std::int32_t*, float* out) {
  const __m256i low_half = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  for (int half = 0; half < 2 * piece.pairs; ++half) {
    const std::uint8_t* line = lines_of(stream, piece, half / 2, half % 2);
    const std::uint16_t* scales = scales_of(stream, piece, half / 2) + half % 2 * kHalf;
    __m256 totals[8] = {};
    for (int group = 0; group < piece.groups; ++group, scales += 2 * kSlice) {
      const std::int8_t* code = codes + group * kGroup;
      const __m256i start = _mm256_sub_epi16(_mm256_setzero_si256(), eights_of(code));
      __m256i sums[8];
      for (auto& one : sums) one = start;
      for (int quad = quads_of(stream, piece.group + group); quad > 0; --quad, line += kLines, code += kQuad) {
        const __m256i four = four_bytes(code);
        for (int k = 0; k < 4; ++k) {
          if (k % 2 == 0) __builtin_prefetch(line + k * kBytes + kAhead, 0, 3);
          const __m256i both = load<__m256i>(line + k * kBytes);
          sums[k] = _mm256_add_epi16(sums[k], _mm256_maddubs_epi16(_mm256_and_si256(both, low_half), four));
          sums[4 + k] = _mm256_add_epi16(
              sums[4 + k], _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(both, 4), low_half), four));
        }
      }
      for (int k = 0; k < 8; ++k)
        totals[k] += _mm256_cvtepi32_ps(_mm256_madd_epi16(sums[k], ones)) *
                     (__m256)bf16_to_float(scales + k / 4 * kSlice + k % 4 * 8);
    }
    float* to = out + half / 2 * 2 * kSlice + half % 2 * kHalf;
    for (int k = 0; k < 8; ++k) store(to + k / 4 * kSlice + k % 4 * 8, totals[k]);
  }
}

#else

void stream_i4(Stream stream, Piece piece, const std::int8_t* codes, const std::int32_t* sums, float* out) {
  std::fill(out, out + static_cast<std::ptrdiff_t>(piece.pairs) * 2 * kSlice, 0.0f);
  for (int half = 0; half < 2 * piece.pairs; ++half) {
    const std::uint8_t* lines = lines_of(stream, piece, half / 2, half % 2);
    const std::uint16_t* scales = scales_of(stream, piece, half / 2) + half % 2 * kHalf;
    float* to = out + half / 2 * 2 * kSlice + half % 2 * kHalf;
    for (int group = 0; group < piece.groups; ++group, scales += 2 * kSlice) {
      const int quads = quads_of(stream, piece.group + group);
      const std::int8_t* code = codes + group * kGroup;
      // Eight outputs of both slices at a time: a group's lines stay in the first-level cache meanwhile.
      for (int at = 0; at < kHalf; at += 8) {
        std::int32_t low[8] = {}, high[8] = {};
        for (int quad = 0; quad < quads; ++quad) {
          const std::uint8_t* both = lines + quad * kLines + at * kQuad;
          for (int i = 0; i < 8 * kQuad; ++i) {
            low[i / kQuad] += (both[i] & 15) * code[quad * kQuad + i % kQuad];
            high[i / kQuad] += (both[i] >> 4) * code[quad * kQuad + i % kQuad];
          }
        }
        for (int j = 0; j < 8; ++j) {
          to[at + j] += static_cast<float>(low[j] - 8 * sums[group]) * bf16_to_float(scales[at + j]);
          to[kSlice + at + j] += static_cast<float>(high[j] - 8 * sums[group]) * bf16_to_float(scales[kSlice + at + j]);
        }
      }
      lines += quads * kLines;
    }
  }
}

#endif

}  // namespace mar::MAR_VARIANT
