// Sixteen sums of products of 16-bit words in plain C++: the reference for the other ISAs.
//
// Include after the ISA's simd_f32 header. Integers are exact, so every ISA gives the same bits.
#pragma once
#include <stdint.h>
#include <string.h>

namespace {

struct Words {  // two for each of sixteen lanes
  int16_t word[32];
};
struct I32x16 {
  int32_t lane[16];
};

constexpr int kDotTile = 4;  // sums kept in registers at once; divides 16

inline Words load_words(const int16_t* p) {
  Words w;
  memcpy(w.word, p, sizeof w.word);
  return w;
}
inline I32x16 zero_sums() { return {}; }
// Each lane adds its two words times the two at `pair`.
inline I32x16 dot(I32x16 sums, Words lanes, const int16_t* pair) {
  for (int i = 0; i < 16; ++i) sums.lane[i] += lanes.word[2 * i] * pair[0] + lanes.word[2 * i + 1] * pair[1];
  return sums;
}
inline F32x16 to_float(I32x16 v) {
  F32x16 r;
  for (int i = 0; i < 16; ++i) r.lane[i] = static_cast<float>(v.lane[i]);
  return r;
}

inline int16_t low_word(float x) { return static_cast<int16_t>(float_bits(x)); }
// The low words of the lanes' bits: all of a, then all of b.
inline void store_words(int16_t* p, F32x16 a, F32x16 b) {
  for (int i = 0; i < 16; ++i) p[i] = low_word(a.lane[i]), p[16 + i] = low_word(b.lane[i]);
}
// a[0], b[0], a[1], b[1] ...
inline void store_pairs(int16_t* p, F32x16 a, F32x16 b) {
  for (int i = 0; i < 16; ++i) p[2 * i] = low_word(a.lane[i]), p[2 * i + 1] = low_word(b.lane[i]);
}
// even[0], odd[0], even[1] ... of sixteen each to `low`, of the next sixteen to `high`.
inline void interleave(int16_t* low, int16_t* high, const int16_t* even, const int16_t* odd) {
  for (int i = 0; i < 16; ++i) {
    low[2 * i] = even[i], low[2 * i + 1] = odd[i];
    high[2 * i] = even[16 + i], high[2 * i + 1] = odd[16 + i];
  }
}
// code * factor / 256, rounded to nearest, ties up, for 32 codes.
inline void store_scaled_bytes(int16_t* p, const int8_t* codes, int16_t factor) {
  for (int i = 0; i < 32; ++i) p[i] = static_cast<int16_t>((codes[i] * 128 * factor + (1 << 14)) >> 15);
}

// The largest of n codes without their signs: that of the largest magnitude, whatever the float format.
inline uint32_t largest_code(const uint16_t* p, int64_t n) {
  uint32_t most = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t code = p[i] & 0x7fffu;
    most = code > most ? code : most;
  }
  return most;
}
inline uint32_t largest_code(const float* p, int64_t n) {
  uint32_t most = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t code = float_bits(p[i]) & 0x7fffffffu;
    most = code > most ? code : most;
  }
  return most;
}

}  // namespace
