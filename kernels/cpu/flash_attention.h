// Attention of queries over keys and values in a paged cache, whatever that cache holds.
//
// Keys are taken in splits of kKeySplit, positions counted from the start of the sequence, and within
// a split in blocks of kKeyBlock; the states of the splits are merged in ascending order. Everything is
// multiplied in 16-bit fixed point (ops_table.h): a unit belongs to one key, value or query, and for weights to
// a block of keys and a query. A query's result therefore depends on its position and on the cache alone.
#pragma once
#include <cstdint>

#include "ops_table.h"
#include "thread_pool.h"

namespace hybrid {

inline constexpr int kKeySplit = 512;

// The queries of a step, one row for each of `num_heads` heads of a token, and the keys they see: those of their
// sequence at positions up to their own.
struct QueryRows {
  int64_t num_tokens, num_heads;
  int64_t num_sequences;
  const int32_t* positions;     // [num_tokens]
  const int32_t* query_start;   // [num_sequences + 1]
  const int32_t* seq_lens;      // [num_sequences]
  const int32_t* block_tables;  // [num_sequences][block_table_stride]
  int64_t block_table_stride;
};

// Throws std::invalid_argument, in the name of `operation`, unless all keys are in the cache.
void check_rows(const char* operation, const QueryRows& rows, int64_t num_blocks);

// Where queries, keys and values come from. A head of keys serves num_heads / num_kv_heads heads of queries.
class AttentionSource {
 public:
  int64_t num_kv_heads;
  int64_t key_dims[2];     // of the two parts of a key; the second may be 0
  int64_t value_dim;
  bool values_are_keys;    // a value is the first part of its key

  virtual const float* query(int64_t token, int64_t head, int part) const = 0;
  // Words and unit of a part of a key, or of a value (fix_key).
  virtual float fix_key(int64_t slot, int64_t kv_head, int part, int16_t* words, int64_t panel_stride) const = 0;
  virtual float fix_value(int64_t slot, int64_t kv_head, int16_t* words, int64_t panel_stride) const = 0;
  virtual void prefetch(int64_t slot, int64_t kv_head) const = 0;

 protected:
  ~AttentionSource() = default;
};

// out: [num_tokens][num_heads][value_dim] float32.
void flash_attention(ThreadPool& pool, const QueryRows& rows, const AttentionSource& source, float scale, float* out);

}  // namespace hybrid
