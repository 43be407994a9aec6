// What the integer kernels for AVX2, with AVX-VNNI or without, share. Included inside each variant only; all of it is local
// to the file that includes it. Does: add in place, narrow, bring four rows side by side, multiply four bytes by four. Does
// not: hold kernels (rows.cpp, blocks.cpp, int8.cpp).
#pragma once

#if defined(__AVX2__) && !defined(__AVX512F__)

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace mar::MAR_VARIANT {
namespace {

// GCC 12 gives `sum + x` a register of its own, keeps the old sum's beside it until the turn ends, and so has room for
// half of a tile only; the rest goes through memory. These have one register for both.
inline __m256i plus_16(__m256i sum, __m256i x) {
  asm("vpaddw %1, %0, %0" : "+x"(sum) : "x"(x));
  return sum;
}
inline __m256i plus_32(__m256i sum, __m256i x) {
  asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(x));
  return sum;
}

#if defined(__AVXVNNI__) || defined(MAR_EMULATE_AVXVNNI)
#define MAR_AVXVNNI
// Each sum plus four unsigned bytes times four signed ones, exactly.
inline __m256i plus_dots(__m256i sums, __m256i bytes, __m256i codes) {
#if defined(__AVXVNNI__)
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(bytes), "x"(codes));
  return sums;
#else
  // The same by other instructions: tests run the kernels so where there is no CPU for them.
  const __m256i even = _mm256_and_si256(bytes, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(bytes, 8);
  const __m256i even_codes = _mm256_srai_epi16(_mm256_slli_epi16(codes, 8), 8), odd_codes = _mm256_srai_epi16(codes, 8);
  const __m256i dots = _mm256_add_epi32(_mm256_madd_epi16(even, even_codes), _mm256_madd_epi16(odd, odd_codes));
  return _mm256_add_epi32(sums, dots);
#endif
}
#endif

inline __m256i four_bytes(const void* from) {
  std::int32_t four;
  std::memcpy(&four, from, sizeof four);
  return _mm256_set1_epi32(four);
}

// Eight integers that fit 8 bits; GCC 12 converts vectors so narrow one by one.
inline void store_bytes(__m256i v, void* to) {
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(words, words));
}

// 16 columns of four rows, each column's four bytes side by side.
inline void store_quad(const __m128i rows[4], void* to) {
  const __m128i a = _mm_unpacklo_epi8(rows[0], rows[1]), b = _mm_unpackhi_epi8(rows[0], rows[1]);
  const __m128i c = _mm_unpacklo_epi8(rows[2], rows[3]), d = _mm_unpackhi_epi8(rows[2], rows[3]);
  auto* out = reinterpret_cast<__m128i*>(to);
  _mm_storeu_si128(out, _mm_unpacklo_epi16(a, c));
  _mm_storeu_si128(out + 1, _mm_unpackhi_epi16(a, c));
  _mm_storeu_si128(out + 2, _mm_unpacklo_epi16(b, d));
  _mm_storeu_si128(out + 3, _mm_unpackhi_epi16(b, d));
}

}  // namespace
}  // namespace mar::MAR_VARIANT

#endif
