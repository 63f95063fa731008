// Attention of queries over keys and values in a paged cache, whatever that cache holds.
//
// Keys are taken in splits of kKeySplit, positions counted from the start of the sequence, and within
// a split in blocks of kKeyBlock; the states of the splits are merged in ascending order. A cache of floats is
// multiplied in floats, any other in 16-bit fixed point (ops_table.h): a unit belongs to one key, value or query,
// and for weights to a block of keys and a query. A query's result therefore depends on its position and on the cache alone.
#pragma once
#include <cstdint>

#include "ops_table.h"
#include "thread_pool.h"

namespace hybrid {

inline constexpr int kKeySplit = 512;

// A plane of a paged cache: [num_blocks][kCacheBlock][width] numbers of its format. kQ8_0: int8 in this layout,
// and behind it the float16 scales, [num_blocks][kCacheBlock][ceil(width / kScaleBlock)].
struct CacheRows {
  void* data;
  CacheFormat format;
  int64_t num_blocks;
  int64_t width;

  int64_t num_slots() const { return num_blocks * kCacheBlock; }
  int64_t element_bytes() const {
    return format == CacheFormat::kF32 ? 4 : format == CacheFormat::kQ8_0 ? 1 : 2;
  }
  uint8_t* row(int64_t slot) const { return static_cast<uint8_t*>(data) + slot * width * element_bytes(); }
  // kQ8_0 only.
  int8_t* codes(int64_t slot) const { return reinterpret_cast<int8_t*>(row(slot)); }
  uint16_t* scales(int64_t slot) const {
    return reinterpret_cast<uint16_t*>(row(num_slots())) + slot * ((width + kScaleBlock - 1) / kScaleBlock);
  }

  // Numbers [first, first + n) of a row in fixed point, not of kF32; of kQ8_0, `first` is a multiple of kScaleBlock.
  float fix(const OpsTable& ops, int64_t slot, int64_t first, int64_t n, int16_t* words, int64_t panel_stride) const {
    if (format == CacheFormat::kQ8_0) {
      return ops.fix_key_q8(codes(slot) + first, scales(slot) + first / kScaleBlock, n, words, panel_stride);
    }
    return ops.fix_key(reinterpret_cast<const uint16_t*>(row(slot)) + first, format, n, words, panel_stride);
  }
  // Of kF32 only.
  float fix(const OpsTable& ops, int64_t slot, int64_t first, int64_t n, float* numbers, int64_t panel_stride) const {
    return ops.copy_key(reinterpret_cast<const float*>(row(slot)) + first, n, numbers, panel_stride);
  }
  void store(const OpsTable& ops, int64_t slot, const float* numbers) const {
    if (format == CacheFormat::kQ8_0) return ops.encode_q8(numbers, width, codes(slot), scales(slot));
    ops.encode(numbers, width, format, row(slot));
  }
  void prefetch(int64_t slot, int64_t first, int64_t n) const {
    const uint8_t* begin = row(slot) + first * element_bytes();
    for (int64_t i = 0; i < n * element_bytes(); i += 64) __builtin_prefetch(begin + i, 0, 2);
  }
};

// Columns [first, first + count) of the rows of a cache.
struct CacheColumns {
  const CacheRows* rows;
  int64_t first, count;

  template <class Number>
  float fix(const OpsTable& ops, int64_t slot, Number* numbers, int64_t panel_stride) const {
    return rows->fix(ops, slot, first, count, numbers, panel_stride);
  }
  void prefetch(int64_t slot) const { rows->prefetch(slot, first, count); }
};

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
  // Where a part of the keys, or the values, of a head stand. All have one format.
  virtual CacheColumns key(int64_t kv_head, int part) const = 0;
  virtual CacheColumns value(int64_t kv_head) const = 0;

 protected:
  ~AttentionSource() = default;
};

// out: [num_tokens][num_heads][value_dim] float32.
void flash_attention(ThreadPool& pool, const QueryRows& rows, const AttentionSource& source, float scale, float* out);

}  // namespace hybrid
