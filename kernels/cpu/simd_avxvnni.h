// The vectors of simd_avx2.h with products by VNNI on 256 bits.
#pragma once
#define KERNEL_AVXVNNI
#include "simd_avx2.h"

#include KERNEL_VNNI256

namespace {

struct V : Avx2 {
  // vpdpbusd wants unsigned codes: signed ones are shifted by 128, the excess is taken off later.
  static constexpr int kSignedBias = 128;
  static constexpr bool kSums32 = true;
  static constexpr int words_that_fit(int) { return 64; }

  static __m256i unsigned_codes(__m256i codes) { return _mm256_xor_si256(codes, _mm256_set1_epi8(-128)); }
  template <bool kSigned>
  static I multiply(I products, I codes, const int8_t* p) {
    const __m256i x = broadcast_dword(p);
    if (kSigned) codes = {unsigned_codes(codes.a), unsigned_codes(codes.b)};
    return {vnni_dpbusd(products.a, codes.a, x), vnni_dpbusd(products.b, codes.b, x)};
  }
  static I factor(I scale) { return scale; }
  static I factor_one() { return set1(1); }
  static I add_scaled(I total, I products, I factor) { return add32(total, mul32(products, factor)); }
  static I dot_pairs(I acc, I pairs, const int16_t* p) {
    int word;
    __builtin_memcpy(&word, p, 4);
    const __m256i x = _mm256_set1_epi32(word);
    return {vnni_dpwssd(acc.a, pairs.a, x), vnni_dpwssd(acc.b, pairs.b, x)};
  }
  static I multiply8(I products, I rows, const uint8_t* signs, const int8_t* p) {
    const __m256i x = broadcast_qword(p);
    rows = negate8(rows, signs);
    return {vnni_dpbusd(products.a, unsigned_codes(rows.a), x), vnni_dpbusd(products.b, unsigned_codes(rows.b), x)};
  }
};

struct W : Avx2Tile {
  static constexpr bool kScalePairs = false;
  static constexpr int code_bias(int) { return V::kSignedBias; }

  static I dot_pairs(I acc, I pairs, const int16_t* p) {
    int word;
    __builtin_memcpy(&word, p, 4);
    return vnni_dpwssd(acc, pairs, _mm256_set1_epi32(word));
  }
  // As in simd_avx512.h, for one register of lanes.
  template <int kWords, int kStride, int kMaxCode, bool kSigned, bool kScaled, int T>
  static void add_products(I (&total)[T], const uint8_t* codes, const int32_t* scale, const int8_t* x) {
    I dot[T];
    KERNEL_UNROLL(8)
    for (int t = 0; t < T; ++t) dot[t] = kScaled ? zero() : total[t];
    KERNEL_UNROLL(8)
    for (int j = 0; j < kWords; ++j) {
      const I word = load(codes + kStride * j);
      KERNEL_UNROLL(8)
      for (int t = 0; t < T; ++t) dot[t] = vnni_dpbusd(dot[t], word, V::broadcast_dword(x + 256 * t + 4 * j));
    }
    const I factor = kScaled ? load(scale) : zero();
    KERNEL_UNROLL(8)
    for (int t = 0; t < T; ++t)
      total[t] = kScaled ? _mm256_add_epi32(total[t], _mm256_mullo_epi32(dot[t], factor)) : dot[t];
  }
};

}  // namespace
