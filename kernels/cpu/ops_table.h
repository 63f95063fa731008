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

// Rows of queries (a row is one head of one token) against one block of keys. The state of a row is
// the running maximum of its scores, the sum of their exponentials and the sum of latents weighted
// by them; `attend` brings it forward by the block. A new row has maximum -inf and zeros.
struct AttentionTile {
  const float* keys;         // [kCacheBlock][width]: latent, then rotary part, each padded with zeros
  const float* queries;      // [num_rows][width], laid out likewise
  int64_t width;             // latent_width + padded rotary part; multiples of 16
  int64_t latent_width;
  const int32_t* num_keys;   // [num_rows]: how many of the keys the row sees
  int32_t num_rows;
  float scale;
  float* scores;             // scratch [num_rows][kCacheBlock]
  float* rescale;            // scratch [num_rows]
  float* maximum;            // [num_rows]
  float* sum;                // [num_rows]
  float* context;            // [num_rows][latent_width]
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
  void (*attend)(const AttentionTile& tile);
  // Brings the state of a row forward by the state of a later split.
  void (*merge)(float* maximum, float* sum, float* context, float later_maximum, float later_sum,
                const float* later_context, int64_t latent_width);
  void (*divide)(const float* x, float divisor, int64_t n, float* out);
  // The maximum of x[n], read by loop `loop` of kNumReadLoops; n is a multiple of 1024.
  float (*read)(const float* x, int64_t n, int loop);
};

extern const OpsTable kOpsScalar, kOpsAvx2, kOpsAvx512Vnni;

}  // namespace hybrid
