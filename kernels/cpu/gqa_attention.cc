#include "gqa_attention.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "ops.h"
#include "scratch.h"

namespace hybrid {
namespace {

std::string number(int64_t n) { return std::to_string(n); }

class GroupedSource final : public AttentionSource {
 public:
  explicit GroupedSource(const GqaAttentionArgs& args) : args_(args) {
    num_kv_heads = args.num_kv_heads;
    key_dims[0] = args.head_dim;
    key_dims[1] = 0;
    value_dim = args.head_dim;
    values_are_keys = false;
  }

  const float* query(int64_t token, int64_t head, int) const override {
    return args_.q + (token * args_.rows.num_heads + head) * args_.head_dim;
  }
  CacheColumns key(int64_t kv_head, int) const override { return {&args_.keys, kv_head * value_dim, value_dim}; }
  CacheColumns value(int64_t kv_head) const override { return {&args_.values, kv_head * value_dim, value_dim}; }

 private:
  const GqaAttentionArgs& args_;
};

void check_heads(const std::string& operation, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim,
                 const CacheRows& cache) {
  if (num_kv_heads < 1 || num_heads < 1 || num_heads % num_kv_heads != 0) {
    throw std::invalid_argument(operation + ": every key head needs the same number of query heads, at least one; found " +
                                number(num_heads) + " and " + number(num_kv_heads) + " heads");
  }
  if (head_dim < 1 || cache.num_blocks < 1) {
    throw std::invalid_argument(operation + ": a cache needs at least one block and one column; found " +
                                number(cache.num_blocks) + " blocks, head_dim " + number(head_dim));
  }
  if (cache.format == CacheFormat::kQ8_0 && head_dim % kScaleBlock != 0) {
    throw std::invalid_argument(operation + ": a q8_0 cache needs a head_dim that is a multiple of " +
                                number(kScaleBlock) + ", found " + number(head_dim));
  }
}

void check_append(const GqaAppendArgs& args) {
  check_heads("gqa_append", args.num_heads, args.num_kv_heads, args.head_dim, args.keys);
  if (args.rope_dim < 0 || args.rope_dim % 2 != 0 || args.rope_dim > args.head_dim) {
    throw std::invalid_argument("gqa_append: rope_dim must be even and at most head_dim " + number(args.head_dim) +
                                ", found " + number(args.rope_dim));
  }
  for (int64_t t = 0; t < args.num_tokens; ++t) {
    if (args.positions[t] < 0 || args.positions[t] >= args.max_positions) {
      throw std::invalid_argument("gqa_append: token " + number(t) + " has position " + number(args.positions[t]) +
                                  "; the rotary table covers " + number(args.max_positions));
    }
    if (args.slot_mapping[t] < -1 || args.slot_mapping[t] >= args.keys.num_slots()) {
      throw std::invalid_argument("gqa_append: token " + number(t) + " is to be stored at slot " +
                                  number(args.slot_mapping[t]) + "; the cache has " + number(args.keys.num_slots()) +
                                  " slots");
    }
  }
}

void rotate_halves(float* x, const float* cos_sin, int64_t dim) {
  for (int64_t i = 0; i < dim / 2; ++i) {
    const float a = x[i], b = x[i + dim / 2], c = cos_sin[2 * i], s = cos_sin[2 * i + 1];
    x[i] = a * c - b * s;
    x[i + dim / 2] = a * s + b * c;
  }
}

}  // namespace

void gqa_attention(ThreadPool& pool, const GqaAttentionArgs& args) {
  if (args.rows.num_tokens == 0) return;
  check_heads("gqa_attention", args.rows.num_heads, args.num_kv_heads, args.head_dim, args.keys);
  check_rows("gqa_attention", args.rows, args.keys.num_blocks);
  flash_attention(pool, args.rows, GroupedSource(args), args.scale, args.out);
}

void gqa_append(ThreadPool& pool, const GqaAppendArgs& args) {
  check_append(args);
  const OpsTable& ops = ops_table(current_isa());
  const auto rotate = args.halves ? rotate_halves : ops.rotate;
  const int64_t width = args.num_kv_heads * args.head_dim;
  Scratch& scratch = Scratch::fresh();
  float* rows = scratch.take<float>(pool.num_threads() * width);
  for_each_token(pool, args.num_tokens, (args.num_heads + 2 * args.num_kv_heads) * args.head_dim, [&](int64_t t, int worker) {
    const float* rope = args.rope + args.positions[t] * args.rope_dim;
    for (int64_t h = 0; h < args.num_heads; ++h) rotate(args.q + (t * args.num_heads + h) * args.head_dim, rope, args.rope_dim);
    if (args.slot_mapping[t] < 0) return;
    float* row = rows + worker * width;
    std::copy_n(args.k + t * width, width, row);
    for (int64_t h = 0; h < args.num_kv_heads; ++h) rotate(row + h * args.head_dim, rope, args.rope_dim);
    args.keys.store(ops, args.slot_mapping[t], row);
    args.values.store(ops, args.slot_mapping[t], args.v + t * width);
  });
}

}  // namespace hybrid
