// Attention over the paged latent cache, and writing that cache.
//
// A row of the cache holds latent_dim + rope_dim numbers: the normalised latent first, then the rotated key part
// that all heads share. In kQ8_0 latent_dim is a multiple of kScaleBlock.
#pragma once
#include <cstdint>

#include "flash_attention.h"
#include "thread_pool.h"

namespace hybrid {

struct LatentCache {
  CacheRows rows;  // latent_dim + rope_dim wide
  int64_t latent_dim;
  int64_t rope_dim;
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
