// Vector routines of the operations that are not matrix products, one table for each ISA.
//
// All tables hold one source (ops_body.inc, attention_body.inc) compiled over another vector type;
// the order of every reduction is fixed by sixteen lanes, so the tables give equal bits.
#pragma once
#include <stdint.h>

namespace hybrid {

// kQ8_0: int8 codes with a float16 scale for each kScaleBlock of them, codes and scales in planes of their own.
enum class CacheFormat : int { kF32 = 0, kF16 = 1, kBF16 = 2, kQ8_0 = 3 };

inline constexpr int kNumReadLoops = 4;
inline constexpr int kCacheBlock = 64;  // tokens in a block of the latent cache
inline constexpr int kScaleBlock = 32;  // numbers of a kQ8_0 row that share a scale

inline constexpr int kLanes = 16;       // rows of queries (a row is one head of one token) worked on together
inline constexpr int kKeyBlock = 128;   // keys worked on together
inline constexpr int kPanel = 64;       // words of a key that stand together
inline constexpr int64_t kPanelStride = kKeyBlock * kPanel + kPanel;            // in words; no power of two
inline constexpr int64_t kValueTileStride = kKeyBlock / 2 * 2 * kLanes + kLanes * 2;

// Attention multiplies 16-bit fixed-point numbers: a unit, a float, times words. Their limits keep all sums
// within 32 bits: a key's or value's word is at most kKeyLimit, the magnitudes of a query's words come to
// kQuerySum at most (besides half a unit for each), those of the weights of a block of keys to kWeightSum.
inline constexpr int kWordLimit = 32767, kKeyLimit = 4095;
inline constexpr int kQuerySum = (1 << 19) - (1 << 15), kWeightSum = (1 << 19) - kKeyBlock;

// kLanes rows of queries against up to kKeyBlock keys. Keys and queries have two parts, the second perhaps
// without panels, each with units of its own. The state of the rows is, by lane: the running maximum of the
// scores, the sum of their exponentials, the sum of values weighted by them. A new state has maximum -inf and zeros.
struct FlashTile {
  const int16_t* keys;          // [panel][kKeyBlock][kPanel], panels kPanelStride apart
  int64_t num_panels[2];
  const float* key_units[2];    // [kKeyBlock], NaN for a key that is not finite
  const int16_t* queries;       // [panel][kPanel / 2][kLanes][2]
  const float* query_units[2];  // [kLanes], the factor of scores included
  const int16_t* values;        // [16 columns][kKeyBlock / 2][16][2 keys], columns kValueTileStride apart
  const float* value_units;     // [kKeyBlock], finite
  int64_t num_value_tiles;      // of 16 columns; even
  int32_t num_keys;             // that some lane sees
  const int32_t* lane_keys;     // [kLanes]: how many the lane sees
  float* scores;                // scratch [kKeyBlock][kLanes]
  int16_t* weights;             // scratch [kKeyBlock / 2][kLanes][2]
  float *rescale, *weight_units;  // scratch [kLanes]
  float* state;                 // [maximum, sum, column 0, column 1 ...][kLanes]
};

struct OpsTable {
  // out = (x + residual) / rms * weight; the sum is written back to `residual` (null: x alone).
  void (*rms_norm)(const float* x, const float* weight, float* residual, float eps, int64_t dim, float* out);
  // Rotates pairs (2i, 2i + 1) of x[dim] by cos_sin[dim / 2][2].
  void (*rotate)(float* x, const float* cos_sin, int64_t dim);
  // Of the float formats.
  void (*encode)(const float* src, int64_t n, CacheFormat format, void* dst);
  // Writes n values and zeros up to the next multiple of 16.
  void (*decode)(const void* src, int64_t n, CacheFormat format, float* dst);
  // kQ8_0: the scale is the largest magnitude / 127, rounded to half; a block with a number that is not
  // finite becomes NaN.
  void (*encode_q8)(const float* src, int64_t n, int8_t* codes, uint16_t* scales);
  // As decode; n may end within a block.
  void (*decode_q8)(const int8_t* codes, const uint16_t* scales, int64_t n, float* dst);
  void (*swiglu)(const float* gate, const float* up, int64_t n, float* out);
  // out[n] = weights[0] * rows[0] + weights[1] * rows[1] + ..., in that order; null rows are left out.
  void (*weighted_sum)(const float* const* rows, const float* weights, int32_t num_rows, int64_t n, float* out);
  // sums[n] += x[0] * rows[0] + x[1] * rows[1] + ..., in that order.
  void (*accumulate)(const float* rows, int64_t stride, const float* x, int32_t num_rows, int64_t n, float* sums);
  void (*softmax)(const float* x, int64_t n, float* out);
  void (*sigmoid)(const float* x, int64_t n, float* out);
  // A part of a key, a value or a query in fixed point; the unit is returned, NaN (and words of zero) where a
  // number is not finite. Words of n numbers and zeros up to a panel; of a query, those of one lane.
  float (*fix_key)(const void* src, CacheFormat format, int64_t n, int16_t* words, int64_t panel_stride);
  float (*fix_key_q8)(const int8_t* codes, const uint16_t* scales, int64_t n, int16_t* words, int64_t panel_stride);
  float (*fix_query)(const float* src, int64_t n, int16_t* lane);
  // Words laid out as keys are, to FlashTile::values. num_keys is rounded up to pairs.
  void (*pair_values)(const int16_t* words, int32_t num_keys, int64_t num_tiles, int16_t* values);
  // The three steps of attention. `score` takes keys from a multiple of 16 on and may go on to the next one.
  void (*score)(const FlashTile& tile, int32_t first_key, int32_t end_key);
  void (*soften)(const FlashTile& tile);
  void (*gather)(const FlashTile& tile);
  // Brings a state forward by that of later keys.
  void (*merge)(float* state, const float* later, int64_t num_columns);
  // Divides the columns of a state by its sums.
  void (*finish)(float* state, int64_t num_columns);
  // The maximum of x[n], read by loop `loop` of kNumReadLoops; n is a multiple of 1024.
  float (*read)(const float* x, int64_t n, int loop);
};

extern const OpsTable kOpsScalar, kOpsAvx2, kOpsAvx512Vnni;

}  // namespace hybrid
