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
inline constexpr int kPanel = 64;       // numbers of a key that stand together
inline constexpr int64_t kPanelStride = kKeyBlock * kPanel + kPanel;            // in numbers; no power of two
inline constexpr int64_t kValueTileStride = kKeyBlock / 2 * 2 * kLanes + kLanes * 2;

// Attention multiplies numbers of one type: floats where the cache holds them, else 16-bit fixed point, a unit
// (a float) times words. Units of floats are 1. Two words fill the 32 bits of a lane's product, one float does.
template <class Number>
inline constexpr int kStep = 4 / sizeof(Number);

// The limits of words keep all sums within 32 bits: a key's or value's word is at most kKeyLimit, the magnitudes of a query's words come to
// kQuerySum at most (besides half a unit for each), those of the weights of a block of keys to kWeightSum.
inline constexpr int kWordLimit = 32767, kKeyLimit = 4095;
inline constexpr int kQuerySum = (1 << 19) - (1 << 15), kWeightSum = (1 << 19) - kKeyBlock;

// kLanes rows of queries against up to kKeyBlock keys. Keys and queries have two parts, the second perhaps
// without panels, each with units of its own. The state of the rows is, by lane: the running maximum of the
// scores, the sum of their exponentials, the sum of values weighted by them. A new state has maximum -inf and zeros.
template <class Number>
struct FlashTile {
  const Number* keys;           // [panel][kKeyBlock][kPanel], panels kPanelStride apart
  int64_t num_panels[2];
  const float* key_units[2];    // [kKeyBlock], NaN for a key that is not finite
  const Number* queries;        // [panel][kPanel / kStep][kLanes][kStep]
  const float* query_units[2];  // [kLanes], the factor of scores included
  const Number* values;         // [16 columns][kKeyBlock / kStep][16][kStep keys], columns kValueTileStride apart
  const float* value_units;     // [kKeyBlock], finite
  int64_t num_value_tiles;      // of 16 columns; even
  int32_t num_keys;             // that some lane sees
  const int32_t* lane_keys;     // [kLanes]: how many the lane sees
  float* scores;                // scratch [kKeyBlock][kLanes]
  Number* weights;              // scratch [kKeyBlock / kStep][kLanes][kStep]
  float *rescale, *weight_units;  // scratch [kLanes]
  float* state;                 // [maximum, sum, column 0, column 1 ...][kLanes]
};

template <class Number>
struct AttentionOps {
  // A part of a query to one lane, and zeros up to a panel. The unit is returned, NaN (and zeros) where a number is
  // not finite.
  float (*fix_query)(const float* src, int64_t n, Number* lane);
  // Numbers laid out as keys are, to FlashTile::values. num_keys is rounded up to kStep.
  void (*pair_values)(const Number* numbers, int32_t num_keys, int64_t num_tiles, Number* values);
  // The three steps of attention. `score` takes keys from a multiple of 16 on and may go on to the next one.
  void (*score)(const FlashTile<Number>& tile, int32_t first_key, int32_t end_key);
  void (*soften)(const FlashTile<Number>& tile);
  void (*gather)(const FlashTile<Number>& tile);
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
  // n numbers of a key or a value, and zeros up to a panel. The unit is returned, NaN (and zeros) where a number is
  // not finite.
  float (*fix_key)(const uint16_t* codes, CacheFormat format, int64_t n, int16_t* words, int64_t panel_stride);
  float (*fix_key_q8)(const int8_t* codes, const uint16_t* scales, int64_t n, int16_t* words, int64_t panel_stride);
  float (*copy_key)(const float* src, int64_t n, float* numbers, int64_t panel_stride);
  AttentionOps<int16_t> words;
  AttentionOps<float> floats;
  // Brings a state forward by that of later keys.
  void (*merge)(float* state, const float* later, int64_t num_columns);
  // Divides the columns of a state by its sums.
  void (*finish)(float* state, int64_t num_columns);
  // The maximum of x[n], read by loop `loop` of kNumReadLoops; n is a multiple of 1024.
  float (*read)(const float* x, int64_t n, int loop);
};

extern const OpsTable kOpsScalar, kOpsAvx2, kOpsAvx512Vnni;

}  // namespace hybrid
