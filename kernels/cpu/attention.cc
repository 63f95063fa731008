#include "attention.h"

#include <cstring>
#include <stdexcept>
#include <string>

#include "ops.h"
#include "scratch.h"

namespace hybrid {
namespace {

int64_t pad16(int64_t n) { return (n + 15) / 16 * 16; }

// Queries and keys in two parts, latent and rotary; values are the latents.
class LatentSource final : public AttentionSource {
 public:
  explicit LatentSource(const MlaAttentionArgs& args) : args_(args) {
    num_kv_heads = 1;
    key_dims[0] = args.cache.latent_dim;
    key_dims[1] = args.cache.rope_dim;
    value_dim = args.cache.latent_dim;
    values_are_keys = true;
  }

  const float* query(int64_t token, int64_t head, int part) const override {
    const int64_t row = token * args_.rows.num_heads + head;
    if (part == 0) return args_.q_latent + row * args_.cache.latent_dim;
    return args_.q + (row + 1) * args_.head_dim - args_.cache.rope_dim;
  }

  CacheColumns key(int64_t, int part) const override {
    return {&args_.cache.rows, part == 0 ? 0 : key_dims[0], key_dims[part]};
  }

  CacheColumns value(int64_t kv_head) const override { return key(kv_head, 0); }

 private:
  const MlaAttentionArgs& args_;
};

[[noreturn]] void refuse(const std::string& problem) { throw std::invalid_argument(problem); }

std::string number(int64_t n) { return std::to_string(n); }

void check_cache(const LatentCache& cache, int64_t head_dim, const char* operation) {
  if (cache.latent_dim < 1 || cache.rope_dim < 2 || cache.rope_dim % 2 != 0 || cache.rows.num_blocks < 1) {
    refuse(std::string(operation) + ": a latent cache needs at least one block, one latent column and an even rope_dim; found " +
           number(cache.rows.num_blocks) + " blocks, latent_dim " + number(cache.latent_dim) + ", rope_dim " +
           number(cache.rope_dim));
  }
  if (cache.rows.format == CacheFormat::kQ8_0 && cache.latent_dim % kScaleBlock != 0) {
    refuse(std::string(operation) + ": a q8_0 cache needs a latent_dim that is a multiple of " + number(kScaleBlock) +
           ", found " + number(cache.latent_dim));
  }
  if (head_dim < cache.rope_dim) {
    refuse(std::string(operation) + ": a query head of " + number(head_dim) + " columns cannot end in rope_dim " +
           number(cache.rope_dim));
  }
}

}  // namespace

void mla_attention(ThreadPool& pool, const MlaAttentionArgs& args) {
  if (args.rows.num_tokens == 0) return;
  check_cache(args.cache, args.head_dim, "mla_attention");
  check_rows("mla_attention", args.rows, args.cache.rows.num_blocks);
  flash_attention(pool, args.rows, LatentSource(args), args.scale, args.out);
}

void mla_append(ThreadPool& pool, const MlaAppendArgs& args) {
  check_cache(args.cache, args.head_dim, "mla_append");
  const LatentCache& cache = args.cache;
  for (int64_t t = 0; t < args.num_tokens; ++t) {
    if (args.positions[t] < 0 || args.positions[t] >= args.max_positions) {
      refuse("mla_append: token " + number(t) + " has position " + number(args.positions[t]) +
             "; the rotary table covers " + number(args.max_positions));
    }
    if (args.slot_mapping[t] < -1 || args.slot_mapping[t] >= cache.rows.num_blocks * kCacheBlock) {
      refuse("mla_append: token " + number(t) + " is to be stored at slot " + number(args.slot_mapping[t]) +
             "; the cache has " + number(cache.rows.num_blocks * kCacheBlock) + " slots");
    }
  }
  const OpsTable& ops = ops_table(current_isa());
  Scratch& scratch = Scratch::fresh();
  const int64_t width = cache.rows.width, row_floats = pad16(width);
  float* rows = scratch.take<float>(pool.num_threads() * row_floats);
  for_each_token(pool, args.num_tokens, args.num_heads * cache.rope_dim + width, [&](int64_t t, int worker) {
    const float* rope = args.rope + args.positions[t] * cache.rope_dim;
    for (int64_t h = 0; h < args.num_heads; ++h) {
      ops.rotate(args.q + (t * args.num_heads + h + 1) * args.head_dim - cache.rope_dim, rope, cache.rope_dim);
    }
    if (args.slot_mapping[t] < 0) return;
    float* row = rows + worker * row_floats;
    ops.rms_norm(args.kv + t * width, args.kv_norm, nullptr, args.eps, cache.latent_dim, row);
    memcpy(row + cache.latent_dim, args.kv + t * width + cache.latent_dim, cache.rope_dim * sizeof(float));
    ops.rotate(row + cache.latent_dim, rope, cache.rope_dim);
    cache.rows.store(ops, args.slot_mapping[t], row);
  });
}

}  // namespace hybrid
