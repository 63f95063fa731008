// Vectors of sixteen lanes in plain C++: the reference the SIMD versions are tested against.
// One lane is one weight row. I holds 16 x 32 bits (or 64 bytes), F holds 16 floats.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

// Unrolling pays where lanes are registers.
#define KERNEL_UNROLL(n)

namespace {

struct V {
  struct I {
    uint32_t l[16];
  };
  struct F {
    float l[16];
  };
  // dot_s8 adds kSignedBias * sum(x) beyond the true product.
  static constexpr int kSignedBias = 0;

  template <class Op>
  static I map(const I& a, const I& b, Op op) {
    I r;
    for (int i = 0; i < 16; ++i) r.l[i] = op(a.l[i], b.l[i]);
    return r;
  }
  template <class Op>
  static I map(const I& a, Op op) {
    I r;
    for (int i = 0; i < 16; ++i) r.l[i] = op(a.l[i]);
    return r;
  }

  static I zero() { return set1(0); }
  static I set1(uint32_t x) {
    I r;
    for (uint32_t& lane : r.l) lane = x;
    return r;
  }
  static I load(const void* p) {
    I r;
    std::memcpy(r.l, p, 64);
    return r;
  }
  static void store(void* p, const I& a) { std::memcpy(p, a.l, 64); }
  // Bytes of `low` and, above them, of `high`.
  static void store_index(uint16_t (&p)[16][4], const I& low, const I& high) {
    for (int i = 0; i < 16; ++i)
      for (int b = 0; b < 4; ++b)
        p[i][b] = static_cast<uint16_t>((low.l[i] >> (8 * b) & 0xff) | (high.l[i] >> (8 * b) & 0xff) << 8);
  }
  // Byte b of lane i to [i / 8][b][i % 8].
  static void store_bytes(uint8_t (&p)[2][4][8], const I& a) {
    for (int i = 0; i < 16; ++i)
      for (int b = 0; b < 4; ++b) p[i / 8][b][i % 8] = static_cast<uint8_t>(a.l[i] >> (8 * b));
  }
  static I load_u8(const uint8_t* p) {
    I r;
    for (int i = 0; i < 16; ++i) r.l[i] = p[i];
    return r;
  }
  static I load_u16(const uint8_t* p) {
    I r;
    for (int i = 0; i < 16; ++i) r.l[i] = p[2 * i] | (p[2 * i + 1] << 8);
    return r;
  }
  static I band(const I& a, const I& b) { return map(a, b, [](uint32_t x, uint32_t y) { return x & y; }); }
  static I bor(const I& a, const I& b) { return map(a, b, [](uint32_t x, uint32_t y) { return x | y; }); }
  static I bxor(const I& a, const I& b) { return map(a, b, [](uint32_t x, uint32_t y) { return x ^ y; }); }
  static I add32(const I& a, const I& b) { return map(a, b, [](uint32_t x, uint32_t y) { return x + y; }); }
  static I sub32(const I& a, const I& b) { return map(a, b, [](uint32_t x, uint32_t y) { return x - y; }); }
  static I mul32(const I& a, const I& b) { return map(a, b, [](uint32_t x, uint32_t y) { return x * y; }); }
  static I shr32(const I& a, int n) { return map(a, [n](uint32_t x) { return x >> n; }); }
  static I shl32(const I& a, int n) { return map(a, [n](uint32_t x) { return x << n; }); }
  static I sar32(const I& a, int n) {
    return map(a, [n](uint32_t x) { return static_cast<uint32_t>(static_cast<int32_t>(x) >> n); });
  }
  static I mul16(const I& a, const I& b) {
    return map(a, b, [](uint32_t x, uint32_t y) {
      const uint32_t lo = ((x & 0xffff) * (y & 0xffff)) & 0xffff;
      return lo | (((x >> 16) * (y >> 16)) << 16);
    });
  }
  static I add8(const I& a, const I& b) {
    return map(a, b, [](uint32_t x, uint32_t y) {
      return ((x & 0x7f7f7f7f) + (y & 0x7f7f7f7f)) ^ ((x ^ y) & 0x80808080);
    });
  }
  static I sub8(const I& a, const I& b) {
    return map(a, b, [](uint32_t x, uint32_t y) {
      return ((x | 0x80808080) - (y & 0x7f7f7f7f)) ^ ((x ^ ~y) & 0x80808080);
    });
  }
  // In every byte the top digit to base 3, of bytes that were xored with kTritBias; tripling leaves that as it is.
  static constexpr uint32_t kTritBias = 0;
  static I top_trit(const I& bytes) {
    return map(bytes, [](uint32_t x) {
      uint32_t out = 0;
      for (int b = 0; b < 4; ++b) out |= ((x >> (8 * b) & 0xff) * 3 >> 8) << (8 * b);
      return out;
    });
  }
  static I lut16(const int8_t* table, const I& nibbles) {
    I r;
    const uint8_t* n = reinterpret_cast<const uint8_t*>(nibbles.l);
    uint8_t* out = reinterpret_cast<uint8_t*>(r.l);
    for (int i = 0; i < 64; ++i) out[i] = static_cast<uint8_t>(table[n[i]]);
    return r;
  }
  // Eight rows of eight columns in one vector: row r is lanes 2r and 2r + 1.
  template <class Index>
  static I lookup8(const uint32_t* table, Index index) {
    I r;
    for (int i = 0; i < 16; ++i) r.l[i] = table[2 * index(i / 2) + i % 2];
    return r;
  }
  // Bit c of signs[r] negates column c of row r.
  static I negate8(const I& rows, const uint8_t* signs) {
    I r;
    int8_t bytes[64];
    std::memcpy(bytes, rows.l, 64);
    for (int i = 0; i < 64; ++i) bytes[i] = static_cast<int8_t>(signs[i / 8] >> (i % 8) & 1 ? -bytes[i] : bytes[i]);
    std::memcpy(r.l, bytes, 64);
    return r;
  }
  // The same from entries of four columns, index(row, 0) and index(row, 1).
  template <class Index>
  static I lookup4_twice(const uint32_t* table, Index index) {
    I r;
    for (int i = 0; i < 16; ++i) r.l[i] = table[index(i / 2, i % 2)];
    return r;
  }
  // Products of such rows, negated as by negate8, with x[0..7]: even lanes x[0..3], odd lanes x[4..7].
  static I multiply8(const I& products, const I& rows, const uint8_t* signs, const int8_t* x) {
    const I codes = negate8(rows, signs);
    const I low = dot_s8(products, codes, x), high = dot_s8(products, codes, x + 4);
    I r;
    for (int i = 0; i < 16; ++i) r.l[i] = i % 2 == 0 ? low.l[i] : high.l[i];
    return r;
  }
  // Lane 8 * half + r to lanes 2 * r and 2 * r + 1.
  static I wide(const I& a, int half) {
    I r;
    for (int i = 0; i < 16; ++i) r.l[i] = a.l[8 * half + i / 2];
    return r;
  }
  // Columns 0-3, and 4-7, of sixteen rows.
  static I low_words(const I& rows, const I& later) {
    I r;
    for (int i = 0; i < 8; ++i) r.l[i] = rows.l[2 * i], r.l[8 + i] = later.l[2 * i];
    return r;
  }
  static I high_words(const I& rows, const I& later) {
    I r;
    for (int i = 0; i < 8; ++i) r.l[i] = rows.l[2 * i + 1], r.l[8 + i] = later.l[2 * i + 1];
    return r;
  }
  // Lane by lane: acc + sum over four bytes of code * x; x is the same in every lane.
  static I dot_u8(const I& acc, const I& codes, const int8_t* x) {
    I r;
    for (int i = 0; i < 16; ++i) {
      const uint32_t c = codes.l[i];
      r.l[i] = acc.l[i] + static_cast<uint32_t>(static_cast<int>(c & 255) * x[0] + static_cast<int>((c >> 8) & 255) * x[1] +
                                                static_cast<int>((c >> 16) & 255) * x[2] + static_cast<int>(c >> 24) * x[3]);
    }
    return r;
  }
  static I dot_s8(const I& acc, const I& codes, const int8_t* x) {
    I r;
    for (int i = 0; i < 16; ++i) {
      int8_t c[4];
      std::memcpy(c, &codes.l[i], 4);
      r.l[i] = acc.l[i] + static_cast<uint32_t>(c[0] * x[0] + c[1] * x[1] + c[2] * x[2] + c[3] * x[3]);
    }
    return r;
  }

  // Sums of products of codes and activations, and what scales them: 32 bits or 16, each ISA in its own way.
  static constexpr bool kSums32 = true;
  static constexpr int words_that_fit(int) { return 64; }
  template <bool kSigned>
  static I multiply(const I& products, const I& codes, const int8_t* x) {
    return kSigned ? dot_s8(products, codes, x) : dot_u8(products, codes, x);
  }
  static I factor(const I& scale) { return scale; }
  static I factor_one() { return set1(1); }
  static I add_scaled(const I& total, const I& products, const I& factor) { return add32(total, mul32(products, factor)); }
  // The low halves of the lanes of two vectors, in one.
  static I pair16(const I& low, const I& high) {
    return map(low, high, [](uint32_t x, uint32_t y) { return (x & 0xffff) | y << 16; });
  }
  // acc + the product of a pair of int16 in each lane and the pair at p.
  static I dot_pairs(const I& acc, const I& pairs, const int16_t* p) {
    return map(acc, pairs, [p](uint32_t sum, uint32_t pair) {
      const int low = static_cast<int16_t>(pair & 0xffff), high = static_cast<int16_t>(pair >> 16);
      return sum + static_cast<uint32_t>(low * p[0] + high * p[1]);
    });
  }

  static F fzero() { return fset1(0.0f); }
  static F fset1(float x) {
    F r;
    for (float& lane : r.l) lane = x;
    return r;
  }
  static F fload(const float* p) {
    F r;
    std::memcpy(r.l, p, 64);
    return r;
  }
  static void fstore(float* p, const F& a) { std::memcpy(p, a.l, 64); }
  static F bits_to_float(const I& a) {
    F r;
    std::memcpy(r.l, a.l, 64);
    return r;
  }
  static F to_float(const I& a) {
    F r;
    for (int i = 0; i < 16; ++i) r.l[i] = static_cast<float>(static_cast<int32_t>(a.l[i]));
    return r;
  }
  // Lanes hold IEEE half bits in their low 16 bits.
  static F half_to_float(const I& a) {
    I r = map(a, [](uint32_t h) {
      const uint32_t sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 31, mantissa = h & 0x3ff;
      if (exponent == 31) return sign | 0x7f800000u | (mantissa << 13) | (mantissa == 0 ? 0u : 0x400000u);  // NaNs quiet
      if (exponent != 0) return sign | ((exponent + 112) << 23) | (mantissa << 13);
      const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
      uint32_t bits;
      std::memcpy(&bits, &magnitude, 4);
      return sign | bits;
    });
    return bits_to_float(r);
  }
  static F fload_f16(const uint8_t* p) { return half_to_float(load_u16(p)); }
  static F fmul(const F& a, const F& b) {
    F r;
    for (int i = 0; i < 16; ++i) r.l[i] = a.l[i] * b.l[i];
    return r;
  }
  static F fma(const F& a, const F& b, const F& c) {
    F r;
    for (int i = 0; i < 16; ++i) r.l[i] = __builtin_fmaf(a.l[i], b.l[i], c.l[i]);
    return r;
  }
  static I float_bits(const F& a) {
    I r;
    std::memcpy(r.l, a.l, 64);
    return r;
  }
  // Lanes below 2^31.
  static I max_positive(const I& a, const I& b) {
    return map(a, b, [](uint32_t x, uint32_t y) { return x > y ? x : y; });
  }
  // Sixteen lanes within +-127 to int8, halves to even.
  static void round_to_bytes(const F& a, int8_t* p) {
    for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(__builtin_lrintf(a.l[i]));
  }
  static void prefetch(const void*) {}
};

// The lanes a product with many tokens takes at once.
struct W : V {
  static constexpr int kLanes = 16;
  static constexpr bool kScalePairs = false;
  static constexpr int code_bias(int) { return 0; }

  // total[t] += scale * (4 * kWords codes of every lane times those of token t at x + 256 * t);
  // words are kStride bytes apart.
  template <int kWords, int kStride, int kMaxCode, bool kSigned, bool kScaled, int T>
  static void add_products(I (&total)[T], const uint8_t* codes, const int32_t* scale, const int8_t* x) {
    for (int t = 0; t < T; ++t) {
      I dot = zero();
      for (int j = 0; j < kWords; ++j) {
        const int8_t* word = x + 256 * t + 4 * j;
        dot = kSigned ? dot_s8(dot, load(codes + kStride * j), word) : dot_u8(dot, load(codes + kStride * j), word);
      }
      total[t] = add32(total[t], kScaled ? mul32(dot, load(scale)) : dot);
    }
  }
};

}  // namespace
