// What dispatch, the threaded operations and the per-ISA kernels agree on.
//
// Packed layout: block_formats.h.
//
// Ordering. A kernel computes one 16-row group over the full K for a list of tokens. Per output
// the order of floating-point operations is fixed: K-blocks ascending, one fused multiply-add for
// each K-block's scaled integer sum (and one for its mins), integers exact inside. Hence the same
// bits on every ISA, for every token count and every thread count.
#pragma once
#include <cstddef>
#include <cstdint>

namespace hybrid {

inline constexpr int kGroupRows = 16;
inline constexpr int kActBlock = 256;  // columns that share one activation scale

// A set of activation rows. For quantised weights the q8 planes are used: int8 codes in
// [-127, 127] with one float scale for every 256 columns (the last block may be shorter) and
// int16 sums of 16 codes. For float weights (F32, F16, BF16) the f32 plane is used.
struct Activations {
  const float* f32 = nullptr;       // [tokens][f32_stride]
  int64_t f32_stride = 0;           // elements
  const int8_t* q8 = nullptr;       // [tokens][q8_stride], zero-padded to a multiple of 64 columns
  int64_t q8_stride = 0;            // bytes
  const float* scale = nullptr;     // [tokens][scale_stride]
  int64_t scale_stride = 0;         // elements
  const int16_t* sum16 = nullptr;   // [tokens][sum_stride]
  int64_t sum_stride = 0;           // elements
};

// out[t * out_stride + r] = sum over k of W[r][k] * x[token_ids ? token_ids[t] : t][k], r < 16.
// All 16 lanes are written; callers give a 16-float tile where fewer rows are wanted.
using GroupKernel = void (*)(const uint8_t* group, int64_t cols, const Activations& x,
                             const int32_t* token_ids, int32_t num_tokens, float* out,
                             int64_t out_stride);

inline constexpr int kMostTileTokens = 128;  // the most a TokenTile holds
inline constexpr int kTileStep = 4;      // its tokens are padded to a multiple of this

// Int8 activations gathered for products with many tokens: what a kernel reads for one block of 256
// columns stands together. Rows that pad the tile, and columns past the end, are zero.
struct TokenTile {
  int64_t num_tokens = 0, padded_tokens = 0;
  const int8_t* q8 = nullptr;      // [blocks of 256 columns][padded_tokens][256]
  const float* scale = nullptr;    // [blocks][padded_tokens]
  const int16_t* sum16 = nullptr;  // [blocks][padded_tokens][16]
};

// As a GroupKernel, bit for bit, for consecutive groups and the tokens of a tile; faster from a few tokens on.
using GroupGemm = void (*)(const uint8_t* group, int64_t num_groups, int64_t cols, const TokenTile& x, float* out,
                           int64_t out_stride);

// Dequantises columns [col, col + n) of a group to f32: out[r * out_stride + c]. col and n are
// multiples of the format's block size (32 or 256; 1 for F32 and F16, 2 for BF16), n <= 256.
using GroupExpand = void (*)(const uint8_t* group, int64_t cols, int64_t col, int64_t n, float* out,
                             int64_t out_stride);

}  // namespace hybrid
