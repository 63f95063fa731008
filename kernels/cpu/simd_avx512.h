// Sixteen lanes as one 512-bit register; see simd_scalar.h for the meaning of each operation.
#pragma once
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#define KERNEL_PRAGMA(text) _Pragma(#text)
#define KERNEL_UNROLL(n) KERNEL_PRAGMA(GCC unroll n)

namespace {

struct V {
  using I = __m512i;
  using F = __m512;
  // vpdpbusd wants unsigned codes: signed ones are shifted by 128, the excess is taken off later.
  static constexpr int kSignedBias = 128;

  static I zero() { return _mm512_setzero_si512(); }
  static I set1(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
  static I load(const void* p) { return _mm512_loadu_si512(p); }
  static void store(void* p, I x) { _mm512_storeu_si512(p, x); }
  static void store_index(uint16_t (&p)[16][4], I low, I high) {
    const I first = _mm512_unpacklo_epi8(low, high), second = _mm512_unpackhi_epi8(low, high);
    store(p[0], _mm512_permutex2var_epi64(first, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), second));
    store(p[8], _mm512_permutex2var_epi64(first, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), second));
  }
  static void store_bytes(uint8_t (&p)[2][4][8], I x) {
    const __m128i turn = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const I order = _mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
    store(p, _mm512_permutexvar_epi32(order, _mm512_shuffle_epi8(x, _mm512_broadcast_i32x4(turn))));
  }
  static I load_u8(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static I load_u16(const uint8_t* p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static I band(I x, I y) { return _mm512_and_si512(x, y); }
  static I bor(I x, I y) { return _mm512_or_si512(x, y); }
  static I bxor(I x, I y) { return _mm512_xor_si512(x, y); }
  static I add32(I x, I y) { return _mm512_add_epi32(x, y); }
  static I sub32(I x, I y) { return _mm512_sub_epi32(x, y); }
  static I mul32(I x, I y) { return _mm512_mullo_epi32(x, y); }
  static I shr32(I x, int n) { return _mm512_srli_epi32(x, static_cast<unsigned>(n)); }
  static I shl32(I x, int n) { return _mm512_slli_epi32(x, static_cast<unsigned>(n)); }
  static I sar32(I x, int n) { return _mm512_srai_epi32(x, static_cast<unsigned>(n)); }
  static I mul16(I x, I y) { return _mm512_mullo_epi16(x, y); }
  static I add8(I x, I y) { return _mm512_add_epi8(x, y); }
  static I sub8(I x, I y) { return _mm512_sub_epi8(x, y); }
  static constexpr uint32_t kTritBias = 0;
  static I top_trit(I x) {
    const __mmask64 one = _mm512_cmpgt_epu8_mask(x, set1(0x55555555)), two = _mm512_cmpgt_epu8_mask(x, set1(0xaaaaaaaau));
    const I ones = _mm512_maskz_mov_epi8(one, set1(0x01010101));
    return _mm512_mask_add_epi8(ones, two, ones, ones);
  }
  static I lut16(const int8_t* table, I nibbles) {
    const I t = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
    return _mm512_shuffle_epi8(t, nibbles);
  }
  // Loads and inserts: on Zen 4 half as long as gathers of quadwords, a third of gathers of words.
  template <class Index>
  static I lookup8(const uint32_t* table, Index index) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(lookup4(table, index, 0)), lookup4(table, index, 4), 1);
  }
  template <class Index>
  static __m256i lookup4(const uint32_t* table, Index index, int row) {
    const __m128i low = lookup2(table, index(row), index(row + 1)), high = lookup2(table, index(row + 2), index(row + 3));
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
  }
  static __m128i lookup2(const uint32_t* table, size_t first, size_t second) {
    const double* entries = reinterpret_cast<const double*>(table);
    return _mm_castpd_si128(_mm_loadh_pd(_mm_load_sd(entries + first), entries + second));
  }
  static I negate8(I rows, const uint8_t* signs) {
    uint64_t mask;
    __builtin_memcpy(&mask, signs, 8);
    return _mm512_mask_sub_epi8(rows, mask, zero(), rows);
  }
  template <class Index>
  static I lookup4_twice(const uint32_t* table, Index index) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(four_rows(table, index, 0)), four_rows(table, index, 4), 1);
  }
  template <class Index>
  static __m256i four_rows(const uint32_t* table, Index index, int row) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(two_rows(table, index, row)), two_rows(table, index, row + 2), 1);
  }
  template <class Index>
  static __m128i two_rows(const uint32_t* table, Index index, int row) {
    __m128i r = _mm_loadu_si32(table + index(row, 0));
    r = _mm_insert_epi32(r, static_cast<int>(table[index(row, 1)]), 1);
    r = _mm_insert_epi32(r, static_cast<int>(table[index(row + 1, 0)]), 2);
    return _mm_insert_epi32(r, static_cast<int>(table[index(row + 1, 1)]), 3);
  }
  static I multiply8(I products, I rows, const uint8_t* signs, const int8_t* p) {
    long long words;
    __builtin_memcpy(&words, p, 8);
    return _mm512_dpbusd_epi32(products, bxor(negate8(rows, signs), set1(0x80808080u)), _mm512_set1_epi64(words));
  }
  static I wide(I x, int half) {
    const I order = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    return _mm512_permutexvar_epi32(half == 0 ? order : _mm512_add_epi32(order, _mm512_set1_epi32(8)), x);
  }
  static I low_words(I rows, I later) {
    const I even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return _mm512_permutex2var_epi32(rows, even, later);
  }
  static I high_words(I rows, I later) {
    const I odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    return _mm512_permutex2var_epi32(rows, odd, later);
  }
  static __m512i broadcast(const void* p) {
    int word;
    __builtin_memcpy(&word, p, 4);
    return _mm512_set1_epi32(word);
  }
  // Sums of products of codes and activations in 32 bits; factors are scales.
  static constexpr bool kSums32 = true;
  static constexpr int words_that_fit(int) { return 64; }
  template <bool kSigned>
  static I multiply(I products, I codes, const int8_t* p) {
    return _mm512_dpbusd_epi32(products, kSigned ? bxor(codes, set1(0x80808080u)) : codes, broadcast(p));
  }
  static I factor(I scale) { return scale; }
  static I factor_one() { return set1(1); }
  static I add_scaled(I total, I products, I factor) { return add32(total, mul32(products, factor)); }
  static I pair16(I low, I high) { return _mm512_mask_blend_epi16(0xaaaaaaaa, low, shl32(high, 16)); }
  static I dot_pairs(I acc, I pairs, const int16_t* p) { return _mm512_dpwssd_epi32(acc, pairs, broadcast(p)); }

  static F fzero() { return _mm512_setzero_ps(); }
  static F fset1(float x) { return _mm512_set1_ps(x); }
  static F fload(const float* p) { return _mm512_loadu_ps(p); }
  static void fstore(float* p, F x) { _mm512_storeu_ps(p, x); }
  static F bits_to_float(I x) { return _mm512_castsi512_ps(x); }
  static F to_float(I x) { return _mm512_cvtepi32_ps(x); }
  static F half_to_float(I x) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(x)); }
  static F fload_f16(const uint8_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static F fmul(F x, F y) { return _mm512_mul_ps(x, y); }
  static F fma(F x, F y, F z) { return _mm512_fmadd_ps(x, y, z); }
  static I float_bits(F x) { return _mm512_castps_si512(x); }
  static I max_positive(I x, I y) { return _mm512_max_epi32(x, y); }
  static void round_to_bytes(F x, int8_t* p) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x)));
  }
  static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
};

// Thirty-two lanes: every broadcast activation meets two registers of codes. With one, the loads would set
// the pace.
struct W {
  struct I {
    __m512i a, b;
  };
  struct F {
    __m512 a, b;
  };
  static constexpr int kLanes = 32;
  static constexpr bool kScalePairs = false;
  static constexpr int code_bias(int) { return V::kSignedBias; }

  static I zero() { return {V::zero(), V::zero()}; }
  static I set1(uint32_t x) { return {V::set1(x), V::set1(x)}; }
  static I load(const void* p) { return {V::load(p), V::load(static_cast<const uint8_t*>(p) + 64)}; }
  static F fset1(float x) { return {V::fset1(x), V::fset1(x)}; }
  static F fload(const float* p) { return {V::fload(p), V::fload(p + 16)}; }
  static void fstore(float* p, F x) {
    V::fstore(p, x.a);
    V::fstore(p + 16, x.b);
  }
  static F to_float(I x) { return {V::to_float(x.a), V::to_float(x.b)}; }
  static F fmul(F x, F y) { return {V::fmul(x.a, y.a), V::fmul(x.b, y.b)}; }
  static F fma(F x, F y, F z) { return {V::fma(x.a, y.a, z.a), V::fma(x.b, y.b, z.b)}; }
  // acc + the product of a pair of int16 in each lane and the pair at p.
  static I dot_pairs(I acc, I pairs, const int16_t* p) {
    const __m512i x = V::broadcast(p);
    return {_mm512_dpwssd_epi32(acc.a, pairs.a, x), _mm512_dpwssd_epi32(acc.b, pairs.b, x)};
  }
  // total[t] += scale * (4 * kWords codes of every lane times those of token t at x + 256 * t);
  // words are kStride bytes apart.
  template <int kWords, int kStride, int kMaxCode, bool kSigned, bool kScaled, int T>
  static void add_products(I (&total)[T], const uint8_t* codes, const int32_t* scale, const int8_t* x) {
    I dot[T];
    KERNEL_UNROLL(8)
    for (int t = 0; t < T; ++t) dot[t] = kScaled ? zero() : total[t];
    KERNEL_UNROLL(8)
    for (int j = 0; j < kWords; ++j) {
      const I word = load(codes + kStride * j);
      KERNEL_UNROLL(8)
      for (int t = 0; t < T; ++t) {
        const __m512i b = V::broadcast(x + 256 * t + 4 * j);
        dot[t] = {_mm512_dpbusd_epi32(dot[t].a, word.a, b), _mm512_dpbusd_epi32(dot[t].b, word.b, b)};
      }
    }
    const I factor = kScaled ? load(scale) : zero();
    KERNEL_UNROLL(8)
    for (int t = 0; t < T; ++t) {
      total[t] = kScaled ? I{V::add32(total[t].a, V::mul32(dot[t].a, factor.a)),
                             V::add32(total[t].b, V::mul32(dot[t].b, factor.b))}
                         : dot[t];
    }
  }
};

}  // namespace
