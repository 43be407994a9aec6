// What the integer kernels for AVX2 share. Included inside each variant only; all of it is local to the file that includes
// it. Does: add in place, narrow, bring four rows side by side. Does not: multiply (blocks.cpp, int8.cpp).
#pragma once

#if defined(__AVX2__) && !defined(__AVX512F__)

#include <immintrin.h>

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
