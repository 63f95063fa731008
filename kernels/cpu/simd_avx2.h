// Sixteen lanes as two 256-bit registers; see simd_scalar.h for the meaning of each operation.
#pragma once
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#define KERNEL_PRAGMA(text) _Pragma(#text)
#define KERNEL_UNROLL(n) KERNEL_PRAGMA(GCC unroll n)

namespace {

struct Avx2 {
  struct I {
    __m256i a, b;
  };
  struct F {
    __m256 a, b;
  };
  static constexpr int kSignedBias = 0;

  static I zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static I set1(uint32_t x) {
    const __m256i v = _mm256_set1_epi32(static_cast<int>(x));
    return {v, v};
  }
  static I load(const void* p) {
    const __m256i* q = static_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
  }
  static void store(void* p, I x) {
    __m256i* q = static_cast<__m256i*>(p);
    _mm256_storeu_si256(q, x.a);
    _mm256_storeu_si256(q + 1, x.b);
  }
  static __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
  static void store_index(uint16_t (&p)[16][4], I low, I high) {
    store_index(p[0], low.a, high.a);
    store_index(p[8], low.b, high.b);
  }
  static void store_index(uint16_t* p, __m256i low, __m256i high) {
    __m128i* out = reinterpret_cast<__m128i*>(p);
    const __m256i first = _mm256_unpacklo_epi8(low, high), second = _mm256_unpackhi_epi8(low, high);
    _mm_storeu_si128(out, _mm256_castsi256_si128(first));
    _mm_storeu_si128(out + 1, _mm256_castsi256_si128(second));
    _mm_storeu_si128(out + 2, _mm256_extracti128_si256(first, 1));
    _mm_storeu_si128(out + 3, _mm256_extracti128_si256(second, 1));
  }
  static void store_bytes(uint8_t (&p)[2][4][8], I x) {
    const __m128i turn = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7), t = _mm256_broadcastsi128_si256(turn);
    store(p, {_mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(x.a, t), order),
              _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(x.b, t), order)});
    asm("" : "+m"(p));  // to be loaded from there, by broadcasts: GCC would shuffle them out of registers
  }
  static I load_u8(const uint8_t* p) {
    const __m128i v = load128(p);
    return {_mm256_cvtepu8_epi32(v), _mm256_cvtepu8_epi32(_mm_srli_si128(v, 8))};
  }
  static I load_u16(const uint8_t* p) {
    return {_mm256_cvtepu16_epi32(load128(p)), _mm256_cvtepu16_epi32(load128(p + 16))};
  }
  static I band(I x, I y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
  static I bor(I x, I y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
  static I bxor(I x, I y) { return {_mm256_xor_si256(x.a, y.a), _mm256_xor_si256(x.b, y.b)}; }
  static I add32(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
  static I sub32(I x, I y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
  static I mul32(I x, I y) { return {_mm256_mullo_epi32(x.a, y.a), _mm256_mullo_epi32(x.b, y.b)}; }
  static I shr32(I x, int n) { return {_mm256_srli_epi32(x.a, n), _mm256_srli_epi32(x.b, n)}; }
  static I shl32(I x, int n) { return {_mm256_slli_epi32(x.a, n), _mm256_slli_epi32(x.b, n)}; }
  static I sar32(I x, int n) { return {_mm256_srai_epi32(x.a, n), _mm256_srai_epi32(x.b, n)}; }
  static I mul16(I x, I y) { return {_mm256_mullo_epi16(x.a, y.a), _mm256_mullo_epi16(x.b, y.b)}; }
  static I add8(I x, I y) { return {_mm256_add_epi8(x.a, y.a), _mm256_add_epi8(x.b, y.b)}; }
  static I sub8(I x, I y) { return {_mm256_sub_epi8(x.a, y.a), _mm256_sub_epi8(x.b, y.b)}; }
  static constexpr uint32_t kTritBias = 0x80808080;  // comparisons are signed
  static I top_trit(I x) { return {top_trit(x.a), top_trit(x.b)}; }
  static __m256i top_trit(__m256i x) {
    __m256i below_one = _mm256_set1_epi8(85 - 128), below_two = _mm256_set1_epi8(170 - 128);
    asm("" : "+x"(below_one), "+x"(below_two));  // GCC turns comparisons with constants into two instructions
    const __m256i one = _mm256_cmpgt_epi8(x, below_one), two = _mm256_cmpgt_epi8(x, below_two);
    return _mm256_abs_epi8(_mm256_add_epi8(one, two));
  }
  static I lut16(const int8_t* table, I nibbles) {
    const __m256i t = _mm256_broadcastsi128_si256(load128(table));
    return {_mm256_shuffle_epi8(t, nibbles.a), _mm256_shuffle_epi8(t, nibbles.b)};
  }
  template <class Index>
  static I lookup8(const uint32_t* table, Index index) {
    return {lookup4(table, index, 0), lookup4(table, index, 4)};
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
  template <class Index>
  static I lookup4_twice(const uint32_t* table, Index index) {
    return {four_rows(table, index, 0), four_rows(table, index, 4)};
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
  static I negate8(I rows, const uint8_t* signs) { return {negate4(rows.a, signs), negate4(rows.b, signs + 4)}; }
  static __m256i negate4(__m256i rows, const uint8_t* signs) {
    const __m256i negative = spread_signs(signs);
    return _mm256_sub_epi8(_mm256_xor_si256(rows, negative), negative);
  }
  // All bits of the bytes that are to be negated in four rows.
  static __m256i spread_signs(const uint8_t* signs) {
    int word;
    __builtin_memcpy(&word, signs, 4);
    // Every byte of a row gets the row's signs, and keeps its own.
    const __m256i spread = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3,
                                            3, 3, 3, 3, 3, 3);
    const __m256i bit = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201u));
    const __m256i own = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(word), spread), bit);
    return _mm256_cmpeq_epi8(own, bit);
  }
  static __m256i broadcast_qword(const int8_t* p) {
    long long words;
    __builtin_memcpy(&words, p, 8);
    return _mm256_set1_epi64x(words);
  }
  // Signs move to x: magnitudes are unsigned.
  static I multiply8(I products, I rows, const uint8_t* signs, const int8_t* p) {
    const __m256i x = broadcast_qword(p), one = _mm256_set1_epi8(1);
    const __m256i first = _mm256_sign_epi8(x, _mm256_or_si256(spread_signs(signs), one));
    const __m256i second = _mm256_sign_epi8(x, _mm256_or_si256(spread_signs(signs + 4), one));
    return {_mm256_add_epi16(products.a, _mm256_maddubs_epi16(rows.a, first)),
            _mm256_add_epi16(products.b, _mm256_maddubs_epi16(rows.b, second))};
  }
  static I wide(I x, int half) {
    const __m256i from = half == 0 ? x.a : x.b;
    return {_mm256_permutevar8x32_epi32(from, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3)),
            _mm256_permutevar8x32_epi32(from, _mm256_setr_epi32(4, 4, 5, 5, 6, 6, 7, 7))};
  }
  template <int kWords>
  static __m256i every_other(I rows) {
    const __m256 words = _mm256_shuffle_ps(_mm256_castsi256_ps(rows.a), _mm256_castsi256_ps(rows.b), kWords);
    return _mm256_permute4x64_epi64(_mm256_castps_si256(words), 0xd8);
  }
  static I low_words(I rows, I later) { return {every_other<0x88>(rows), every_other<0x88>(later)}; }
  static I high_words(I rows, I later) { return {every_other<0xdd>(rows), every_other<0xdd>(later)}; }
  static __m256i broadcast_dword(const int8_t* x) {
    int word;
    __builtin_memcpy(&word, x, 4);
    return _mm256_set1_epi32(word);
  }
  // Sums of products of codes and activations in 16 bits, for as many words as codes of that size allow; factors
  // are pairs of the same int16, so that vpmaddwd widens and scales in one. vpmaddubsw saturates, so unsigned codes must
  // stay <= 127: 2 * 127 * 127 < 2^15. Signed codes go in as |code| with their sign moved to x.
  static constexpr bool kSums32 = false;
  static constexpr int words_that_fit(int max_code) {
    const int fit = 32767 / (2 * max_code * 127);
    return fit >= 16 ? 16 : fit >= 8 ? 8 : fit >= 4 ? 4 : fit >= 2 ? 2 : 1;
  }
  template <bool kSigned>
  static I multiply(I products, I codes, const int8_t* p) {
    const __m256i x = broadcast_dword(p);
    return {_mm256_add_epi16(products.a, product4<kSigned>(codes.a, x)),
            _mm256_add_epi16(products.b, product4<kSigned>(codes.b, x))};
  }
  template <bool kSigned>
  static __m256i product4(__m256i codes, __m256i x) {
    if (!kSigned) return _mm256_maddubs_epi16(codes, x);
    return _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(x, codes));
  }
  static I factor(I scale) { return pair16(scale, scale); }
  static I factor_one() { return set1(0x10001u); }
  static I add_scaled(I total, I products, I factor) {
    return {_mm256_add_epi32(total.a, _mm256_madd_epi16(products.a, factor.a)),
            _mm256_add_epi32(total.b, _mm256_madd_epi16(products.b, factor.b))};
  }
  static I pair16(I low, I high) {
    return {_mm256_blend_epi16(low.a, _mm256_slli_epi32(high.a, 16), 0xaa),
            _mm256_blend_epi16(low.b, _mm256_slli_epi32(high.b, 16), 0xaa)};
  }
  static I dot_pairs(I acc, I pairs, const int16_t* p) {
    int word;
    __builtin_memcpy(&word, p, 4);
    return add_scaled(acc, pairs, {_mm256_set1_epi32(word), _mm256_set1_epi32(word)});
  }

  static F fzero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static F fset1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static F fload(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static void fstore(float* p, F x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
  }
  static F bits_to_float(I x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
  static F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
  static F half_to_float(I x) {
    // packus works within 128-bit halves: put the four quarters back in order.
    const __m256i h = _mm256_permute4x64_epi64(_mm256_packus_epi32(x.a, x.b), 0xd8);
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(h)), _mm256_cvtph_ps(_mm256_extracti128_si256(h, 1))};
  }
  static F fload_f16(const uint8_t* p) { return {_mm256_cvtph_ps(load128(p)), _mm256_cvtph_ps(load128(p + 16))}; }
  static F fmul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
  static F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
  static I float_bits(F x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
  static I max_positive(I x, I y) { return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)}; }
  static void round_to_bytes(F x, int8_t* p) {
    __m256i w = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));
    w = _mm256_permute4x64_epi64(w, 0xd8);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
  }
  static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
};

// Eight lanes: sixteen registers hold the sums of four tokens, not of more.
struct Avx2Tile {
  using I = __m256i;
  using F = __m256;
  static constexpr int kLanes = 8;
  static constexpr bool kScalePairs = true;
  // Where unsigned codes stay so small that more than two products fit 16 bits.
  static constexpr int code_bias(int max_code) { return max_code <= 31 ? max_code : 0; }

  static I zero() { return _mm256_setzero_si256(); }
  static I set1(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
  static I load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static F fset1(float x) { return _mm256_set1_ps(x); }
  static F fload(const float* p) { return _mm256_loadu_ps(p); }
  static void fstore(float* p, F x) { _mm256_storeu_ps(p, x); }
  static F to_float(I x) { return _mm256_cvtepi32_ps(x); }
  static F fmul(F x, F y) { return _mm256_mul_ps(x, y); }
  static F fma(F x, F y, F z) { return _mm256_fmadd_ps(x, y, z); }

  // acc + the product of a pair of int16 in each lane and the pair at p.
  static I dot_pairs(I acc, I pairs, const int16_t* p) {
    int word;
    __builtin_memcpy(&word, p, 4);
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi32(word)));
  }
  // total[t] += scale * (4 * kWords codes of every lane times those of token t at x + 256 * t);
  // words are kStride bytes apart. Sums of products
  // stay in 16 bits for as many words as kMaxCode allows; vpmaddwd then widens and scales them in one.
  template <int kWords, int kStride, int kMaxCode, bool kSigned, bool kScaled, int T>
  static void add_products(I (&total)[T], const uint8_t* codes, const int32_t* scale, const int8_t* x) {
    constexpr int kFit = 32767 / (2 * kMaxCode * 127);
    constexpr int kChunk = kFit >= 8 ? 8 : kFit >= 4 ? 4 : kFit >= 2 ? 2 : 1;
    static_assert(kFit >= 1);
    const I factor = kScaled ? load(scale) : _mm256_set1_epi16(1);
    for (int j = 0; j < kWords; j += kChunk) {
      I sum[T];
      KERNEL_UNROLL(8)
      for (int i = 0; i < (kChunk < kWords ? kChunk : kWords); ++i) {
        const I word = load(codes + kStride * (j + i));
        const I magnitude = kSigned ? _mm256_abs_epi8(word) : word;
        KERNEL_UNROLL(8)
        for (int t = 0; t < T; ++t) {
          I b = Avx2::broadcast_dword(x + 256 * t + 4 * (j + i));
          if (kSigned) b = _mm256_sign_epi8(b, word);
          const I product = _mm256_maddubs_epi16(magnitude, b);
          sum[t] = i == 0 ? product : _mm256_add_epi16(sum[t], product);
          asm("" : "+x"(sum[t]));  // now: GCC would keep all products for a later sum, in memory
        }
      }
      KERNEL_UNROLL(8)
      for (int t = 0; t < T; ++t) total[t] = _mm256_add_epi32(total[t], _mm256_madd_epi16(sum[t], factor));
    }
  }
};

#ifndef KERNEL_AVXVNNI
using V = Avx2;
using W = Avx2Tile;
#endif

}  // namespace
