// Sums of products of 16-bit words in zmm registers. The contract is in simd_words_scalar.h.
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace {

using Words = __m512i;
using I32x16 = __m512i;

constexpr int kDotTile = 16;

inline Words load_words(const int16_t* p) { return _mm512_loadu_si512(p); }
inline I32x16 zero_sums() { return _mm512_setzero_si512(); }
inline I32x16 dot(I32x16 sums, Words lanes, const int16_t* pair) {
  // As an intrinsic GCC 12 copies every sum before adding to it, and sixteen of them no longer fit the registers.
  asm("vpdpwssd %2%{1to16%}, %1, %0" : "+v"(sums) : "v"(lanes), "m"(*reinterpret_cast<const int16_t(*)[2]>(pair)));
  return sums;
}
inline F32x16 to_float(I32x16 v) { return _mm512_cvtepi32_ps(v); }

inline void store_words(int16_t* p, F32x16 a, F32x16 b) {
  const __m512i even = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28, 26, 24,
                                        22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  _mm512_storeu_si512(p, _mm512_permutex2var_epi16(_mm512_castps_si512(a), even, _mm512_castps_si512(b)));
}
inline void store_pairs(int16_t* p, F32x16 a, F32x16 b) {
  const __m512i upper = _mm512_slli_epi32(_mm512_castps_si512(b), 16);
  _mm512_storeu_si512(p, _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_castps_si512(a), upper));
}
inline void interleave(int16_t* low, int16_t* high, const int16_t* even, const int16_t* odd) {
  const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  const __m512i a = _mm512_loadu_si512(even), b = _mm512_loadu_si512(odd);
  _mm512_storeu_si512(low, _mm512_permutex2var_epi16(a, first, b));
  _mm512_storeu_si512(high, _mm512_permutex2var_epi16(a, second, b));
}
inline void store_scaled_bytes(int16_t* p, const int8_t* codes, int16_t factor) {
  const __m512i wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
  _mm512_storeu_si512(p, _mm512_mulhrs_epi16(_mm512_slli_epi16(wide, 7), _mm512_set1_epi16(factor)));
}

inline uint32_t largest_code(const uint16_t* p, int64_t n) {
  const __m512i magnitude = _mm512_set1_epi16(0x7fff);
  __m512i most[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      most[v] = _mm512_max_epu16(most[v], _mm512_and_si512(_mm512_loadu_si512(p + i + 32 * v), magnitude));
    }
  }
  for (; i < n; i += 32) {
    const __mmask32 lanes = n - i >= 32 ? 0xffffffffu : (1u << (n - i)) - 1;
    most[0] = _mm512_max_epu16(most[0], _mm512_and_si512(_mm512_maskz_loadu_epi16(lanes, p + i), magnitude));
  }
  const __m512i both = _mm512_max_epu16(most[0], most[1]);
  const __m512i low = _mm512_and_si512(both, _mm512_set1_epi32(0xffff));
  return _mm512_reduce_max_epu32(_mm512_max_epu32(low, _mm512_srli_epi32(both, 16)));
}
inline uint32_t largest_code(const float* p, int64_t n) {
  __m512i most = _mm512_setzero_si512();
  for (int64_t i = 0; i < n; i += 16) {
    const __m512i bits = _mm512_castps_si512(load_n(p + i, n - i));
    most = _mm512_max_epu32(most, _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)));
  }
  return _mm512_reduce_max_epu32(most);
}

}  // namespace
