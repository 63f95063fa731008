// Attention over the paged latent cache, and writing that cache.
//
// Cache layout: [num_blocks][kCacheBlock][latent_dim + rope_dim] elements of the cache's format, the
// normalised latent first, then the rotated key part that all heads share. kQ8_0: int8 in this layout,
// and behind it the float16 scales, [num_blocks][kCacheBlock][ceil((latent_dim + rope_dim) / kScaleBlock)];
// latent_dim is a multiple of kScaleBlock.
#pragma once
#include <cstdint>

#include "flash_attention.h"
#include "ops_table.h"
#include "thread_pool.h"

namespace hybrid {

struct LatentCache {
  void* data;
  CacheFormat format;
  int64_t num_blocks;
  int64_t latent_dim;
  int64_t rope_dim;

  int64_t width() const { return latent_dim + rope_dim; }
  int64_t num_slots() const { return num_blocks * kCacheBlock; }
  int64_t element_bytes() const {
    return format == CacheFormat::kF32 ? 4 : format == CacheFormat::kQ8_0 ? 1 : 2;
  }
  uint8_t* row(int64_t slot) const { return static_cast<uint8_t*>(data) + slot * width() * element_bytes(); }
  // kQ8_0 only.
  int8_t* codes(int64_t slot) const { return reinterpret_cast<int8_t*>(row(slot)); }
  uint16_t* scales(int64_t slot) const {
    return reinterpret_cast<uint16_t*>(row(num_slots())) + slot * ((width() + kScaleBlock - 1) / kScaleBlock);
  }
};

struct MlaAppendArgs {
  float* q;                 // [num_tokens][num_heads][head_dim]; the last rope_dim of each head is rotated
  int64_t num_tokens, num_heads, head_dim;
  const float* kv;          // [num_tokens][latent_dim + rope_dim]
  const float* kv_norm;     // [latent_dim]
  float eps;
  const float* rope;        // [max_positions][rope_dim / 2][2]: cos, sin
  int64_t max_positions;
  LatentCache cache;
  const int32_t* positions;     // [num_tokens]
  const int32_t* slot_mapping;  // [num_tokens]; -1: the row is not stored
};
// Throws std::invalid_argument before anything is written.
void mla_append(ThreadPool& pool, const MlaAppendArgs& args);

struct MlaAttentionArgs {
  const float* q;         // [num_tokens][num_heads][head_dim]; the last rope_dim of each head is used
  const float* q_latent;  // [num_tokens][num_heads][latent_dim]
  QueryRows rows;
  int64_t head_dim;
  LatentCache cache;
  float scale;
  float* out;             // [num_tokens][num_heads][latent_dim]
};
// Throws std::invalid_argument before anything is written.
void mla_attention(ThreadPool& pool, const MlaAttentionArgs& args);

}  // namespace hybrid
