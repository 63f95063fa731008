// Sums of products of 16-bit words in pairs of ymm registers. The contract is in simd_words_scalar.h.
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace {

struct Words {
  __m256i low, high;
};
struct I32x16 {
  __m256i low, high;
};

constexpr int kDotTile = 4;

inline __m256i load_bits(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store_bits(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }

inline Words load_words(const int16_t* p) { return {load_bits(p), load_bits(p + 16)}; }
inline I32x16 zero_sums() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline I32x16 dot(I32x16 sums, Words lanes, const int16_t* pair) {
  int32_t both;
  memcpy(&both, pair, sizeof both);
  const __m256i other = _mm256_set1_epi32(both);
  return {_mm256_add_epi32(sums.low, _mm256_madd_epi16(lanes.low, other)),
          _mm256_add_epi32(sums.high, _mm256_madd_epi16(lanes.high, other))};
}
inline F32x16 to_float(I32x16 v) { return {_mm256_cvtepi32_ps(v.low), _mm256_cvtepi32_ps(v.high)}; }

inline __m256i low_words(__m256 v) {  // as numbers of 32 bits, sign and all
  return _mm256_srai_epi32(_mm256_slli_epi32(_mm256_castps_si256(v), 16), 16);
}
inline __m256i sixteen_words(F32x16 v) {
  return _mm256_permute4x64_epi64(_mm256_packs_epi32(low_words(v.low), low_words(v.high)), 0xd8);
}
inline void store_words(int16_t* p, F32x16 a, F32x16 b) {
  store_bits(p, sixteen_words(a));
  store_bits(p + 16, sixteen_words(b));
}
inline __m256i eight_pairs(__m256 a, __m256 b) {
  return _mm256_blend_epi16(_mm256_castps_si256(a), _mm256_slli_epi32(_mm256_castps_si256(b), 16), 0xaa);
}
inline void store_pairs(int16_t* p, F32x16 a, F32x16 b) {
  store_bits(p, eight_pairs(a.low, b.low));
  store_bits(p + 16, eight_pairs(a.high, b.high));
}
inline void interleave_sixteen(int16_t* p, __m256i even, __m256i odd) {
  const __m256i low = _mm256_unpacklo_epi16(even, odd), high = _mm256_unpackhi_epi16(even, odd);
  store_bits(p, _mm256_permute2x128_si256(low, high, 0x20));
  store_bits(p + 16, _mm256_permute2x128_si256(low, high, 0x31));
}
inline void interleave(int16_t* low, int16_t* high, const int16_t* even, const int16_t* odd) {
  interleave_sixteen(low, load_bits(even), load_bits(odd));
  interleave_sixteen(high, load_bits(even + 16), load_bits(odd + 16));
}
inline void store_scaled_bytes(int16_t* p, const int8_t* codes, int16_t factor) {
  for (int i = 0; i < 32; i += 16) {
    const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i)));
    store_bits(p + i, _mm256_mulhrs_epi16(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(factor)));
  }
}

inline uint32_t largest_lane(__m256i v) {
  uint32_t lanes[8], most = 0;
  store_bits(lanes, v);
  for (uint32_t lane : lanes) most = lane > most ? lane : most;
  return most;
}
inline uint32_t largest_code(const uint16_t* p, int64_t n) {
  const __m256i magnitude = _mm256_set1_epi16(0x7fff);
  __m256i most = _mm256_setzero_si256();
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) most = _mm256_max_epu16(most, _mm256_and_si256(load_bits(p + i), magnitude));
  const __m256i low = _mm256_and_si256(most, _mm256_set1_epi32(0xffff));
  uint32_t largest = largest_lane(_mm256_max_epu32(low, _mm256_srli_epi32(most, 16)));
  for (; i < n; ++i) {
    const uint32_t code = p[i] & 0x7fffu;
    largest = code > largest ? code : largest;
  }
  return largest;
}
inline uint32_t largest_code(const float* p, int64_t n) {
  const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  __m256i most = _mm256_setzero_si256();
  for (int64_t i = 0; i < n; i += 16) {
    const F32x16 v = load_n(p + i, n - i);
    most = _mm256_max_epu32(most, _mm256_castps_si256(_mm256_and_ps(v.low, magnitude)));
    most = _mm256_max_epu32(most, _mm256_castps_si256(_mm256_and_ps(v.high, magnitude)));
  }
  return largest_lane(most);
}

}  // namespace
