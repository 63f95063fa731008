// Attention with grouped heads over paged keys and values, and writing those.
//
// A row of `keys` and of `values` holds [num_kv_heads][head_dim] numbers. Query head h belongs to key head
// h / (num_heads / num_kv_heads). In kQ8_0 head_dim is a multiple of kScaleBlock.
#pragma once
#include <cstdint>

#include "flash_attention.h"
#include "thread_pool.h"

namespace hybrid {

struct GqaAppendArgs {
  float* q;        // [num_tokens][num_heads][head_dim]; the first rope_dim of each head are rotated
  int64_t num_tokens, num_heads, num_kv_heads, head_dim;
  const float* k;  // [num_tokens][num_kv_heads][head_dim]; stored rotated likewise
  const float* v;  // the same shape
  const float* rope;  // [max_positions][rope_dim / 2][2]: cos, sin
  int64_t rope_dim, max_positions;
  bool halves;     // pairs are (i, i + rope_dim / 2), else (2i, 2i + 1)
  CacheRows keys, values;
  const int32_t* positions;     // [num_tokens]
  const int32_t* slot_mapping;  // [num_tokens]; -1: the row is not stored
};
// Throws std::invalid_argument before anything is written.
void gqa_append(ThreadPool& pool, const GqaAppendArgs& args);

struct GqaAttentionArgs {
  const float* q;  // [num_tokens][num_heads][head_dim]
  QueryRows rows;
  int64_t num_kv_heads, head_dim;
  CacheRows keys, values;
  float scale;
  float* out;      // as q
};
// Throws std::invalid_argument before anything is written.
void gqa_attention(ThreadPool& pool, const GqaAttentionArgs& args);

}  // namespace hybrid
