// Sixteen floats in plain C++: the reference for the vector types of the other ISAs.
//
// Every ISA gives the same functions over a type F32x16, with the same lane order, the same
// reduction tree and fused multiply-adds only where `fma` is written, so that a body included
// for several ISAs gives the same bits on each. Include in ISA files only (no std templates here).
#pragma once
#include <stdint.h>
#include <string.h>

namespace {

struct F32x16 {
  float lane[16];
};

inline uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float bits_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// IEEE half and bfloat16, rounded to nearest even; a NaN stays a (quiet) NaN.
inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00u) {
    return bits_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13 | (magnitude > 0x7c00u ? 0x400000u : 0u));
  }
  // Exponent rebias by a product: exact for subnormals too.
  return bits_float(sign | float_bits(bits_float(magnitude << 13) * bits_float(0x77800000u)));
}

inline uint16_t float_to_half(float x) {
  const uint32_t bits = float_bits(x);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | (magnitude >> 13 & 0x3ffu));
  if (magnitude >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {
    // Adding 0.5 leaves the subnormal's code, correctly rounded, in the low bits.
    return static_cast<uint16_t>(sign | (float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13);
}

inline float bfloat_to_float(uint16_t b) { return bits_float(static_cast<uint32_t>(b) << 16); }

inline uint16_t float_to_bfloat(float x) {
  const uint32_t bits = float_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

#define HYBRID_LANES(expression)                        \
  F32x16 r;                                             \
  for (int i = 0; i < 16; ++i) r.lane[i] = expression; \
  return r

inline F32x16 set1(float x) { HYBRID_LANES(x); }
inline F32x16 load(const float* p) { HYBRID_LANES(p[i]); }
inline F32x16 load_n(const float* p, int64_t n) { HYBRID_LANES(i < n ? p[i] : 0.0f); }
inline float widen_half(uint16_t h) { return half_to_float(h); }
inline F32x16 load_half(const uint16_t* p) { HYBRID_LANES(half_to_float(p[i])); }
inline F32x16 load_bfloat(const uint16_t* p) { HYBRID_LANES(bfloat_to_float(p[i])); }
inline F32x16 load_bytes(const int8_t* p) { HYBRID_LANES(static_cast<float>(p[i])); }
inline F32x16 add(F32x16 a, F32x16 b) { HYBRID_LANES(a.lane[i] + b.lane[i]); }
inline F32x16 sub(F32x16 a, F32x16 b) { HYBRID_LANES(a.lane[i] - b.lane[i]); }
inline F32x16 mul(F32x16 a, F32x16 b) { HYBRID_LANES(a.lane[i] * b.lane[i]); }
inline F32x16 div(F32x16 a, F32x16 b) { HYBRID_LANES(a.lane[i] / b.lane[i]); }
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
  HYBRID_LANES(__builtin_fmaf(a.lane[i], b.lane[i], c.lane[i]));
}
// The second operand where either is NaN, as the x86 instructions do.
inline F32x16 max(F32x16 a, F32x16 b) { HYBRID_LANES(a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]); }
inline F32x16 min(F32x16 a, F32x16 b) { HYBRID_LANES(a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]); }
// v where x >= limit or x is NaN, else 0.
inline F32x16 zero_below(F32x16 v, F32x16 x, F32x16 limit) {
  HYBRID_LANES(x.lane[i] < limit.lane[i] ? 0.0f : v.lane[i]);
}
// The bits of v plus the low bits of t moved to the exponent field.
inline F32x16 add_exponent(F32x16 v, F32x16 t) {
  HYBRID_LANES(bits_float(float_bits(v.lane[i]) + (float_bits(t.lane[i]) << 23)));
}
#undef HYBRID_LANES

inline void store(float* p, F32x16 v) {
  for (int i = 0; i < 16; ++i) p[i] = v.lane[i];
}
inline void store_n(float* p, F32x16 v, int64_t n) {
  for (int i = 0; i < 16 && i < n; ++i) p[i] = v.lane[i];
}
inline void store_half(uint16_t* p, F32x16 v) {
  for (int i = 0; i < 16; ++i) p[i] = float_to_half(v.lane[i]);
}
inline void store_bfloat(uint16_t* p, F32x16 v) {
  for (int i = 0; i < 16; ++i) p[i] = float_to_bfloat(v.lane[i]);
}

// Halves are folded until one lane is left: i with i + 8, i + 4, i + 2, i + 1.
inline float reduce_add(F32x16 v) {
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) v.lane[i] += v.lane[i + half];
  }
  return v.lane[0];
}
inline float reduce_max(F32x16 v) {
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) v.lane[i] = v.lane[i] > v.lane[i + half] ? v.lane[i] : v.lane[i + half];
  }
  return v.lane[0];
}

}  // namespace
