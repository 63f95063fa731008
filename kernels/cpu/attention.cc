#include "attention.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

#include "ops.h"
#include "scratch.h"

namespace hybrid {
namespace {

constexpr int64_t kRowsPerUnit = 64;     // (token, head) pairs that share a decoded block of keys
constexpr int64_t kMostHeads = 32;       // of one token in a unit
constexpr int64_t kFewestHeads = 4;
constexpr int64_t kMostStateFloats = 8 << 20;  // partial states kept at once: 32 MiB

int64_t pad16(int64_t n) { return (n + 15) / 16 * 16; }
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Consecutive tokens of one sequence that are worked on together.
struct QueryBlock {
  int32_t sequence, first_token, num_tokens, num_splits;
};

// One unit of work: some heads of a query block over splits [first_split, end_split).
struct Unit {
  int32_t block, first_split, end_split;
};

// What a worker keeps while it runs a unit; all arrays have kRowsPerUnit rows.
struct Workspace {
  float *keys, *queries, *scores, *rescale;
  int32_t* num_keys;
  float *maximum, *sum, *context;           // state of the split at hand
  float *all_maximum, *all_sum, *all_context;  // splits merged so far
};

class Attention {
 public:
  Attention(ThreadPool& pool, const MlaAttentionArgs& args)
      : pool_(pool),
        args_(args),
        ops_(ops_table(current_isa())),
        scratch_(Scratch::fresh()),
        latent_width_(pad16(args.cache.latent_dim)),
        width_(latent_width_ + pad16(args.cache.rope_dim)),
        state_floats_(latent_width_ + 2) {}

  void run() {
    heads_per_unit_ = std::min(args_.num_heads, kMostHeads);
    tokens_per_block_ = std::max<int64_t>(1, kRowsPerUnit / heads_per_unit_);
    find_query_blocks();
    choose_units();
    allocate_workspaces();
    const int64_t head_groups = ceil_div(args_.num_heads, heads_per_unit_);
    pool_.parallel_for(num_units_ * head_groups, [&](int64_t index, int worker) {
      run_unit(units_[index / head_groups], index % head_groups * heads_per_unit_, workspaces_[worker]);
    });
    if (partial_ == nullptr) return;
    pool_.parallel_for(args_.num_tokens, [&](int64_t token, int) {
      for (int64_t head = 0; head < args_.num_heads; ++head) merge_partials(token, head);
    });
  }

 private:
  int32_t splits_of(int64_t token) const { return args_.positions[token] / kKeySplit + 1; }

  void find_query_blocks() {
    blocks_ = scratch_.take<QueryBlock>(args_.num_tokens);
    for (int64_t s = 0; s < args_.num_sequences; ++s) {
      int32_t token = args_.query_start[s];
      while (token < args_.query_start[s + 1]) {
        const int64_t left = args_.query_start[s + 1] - token;
        const int32_t count = static_cast<int32_t>(std::min(left, tokens_per_block_));
        int32_t splits = 0;
        for (int32_t i = 0; i < count; ++i) splits = std::max(splits, splits_of(token + i));
        blocks_[num_blocks_++] = {static_cast<int32_t>(s), token, count, splits};
        token += count;
      }
    }
  }

  // A unit per split where the partial states fit, else a unit merges all splits of its block itself.
  // The arithmetic is the same.
  void choose_units() {
    int64_t states = 0, split_units = 0;
    for (int64_t t = 0; t < args_.num_tokens; ++t) states += splits_of(t);
    for (int64_t b = 0; b < num_blocks_; ++b) split_units += blocks_[b].num_splits;
    const bool apart = states * args_.num_heads * state_floats_ <= kMostStateFloats;
    if (apart) allocate_partials(states);
    num_units_ = apart ? split_units : num_blocks_;
    units_ = scratch_.take<Unit>(num_units_);
    Unit* unit = units_;
    for (int32_t b = 0; b < num_blocks_; ++b) {
      const int32_t step = apart ? 1 : blocks_[b].num_splits;
      for (int32_t s = 0; s < blocks_[b].num_splits; s += step) *unit++ = {b, s, s + step};
    }
    const int64_t wanted = 4 * static_cast<int64_t>(pool_.num_threads());
    while (num_units_ * ceil_div(args_.num_heads, heads_per_unit_) < wanted && heads_per_unit_ > kFewestHeads) {
      heads_per_unit_ = std::max(kFewestHeads, (heads_per_unit_ + 1) / 2);
    }
  }

  // Partial states stand as [token][split][head].
  void allocate_partials(int64_t states) {
    partial_ = scratch_.take<float>(states * args_.num_heads * state_floats_);
    first_state_ = scratch_.take<int64_t>(args_.num_tokens);
    int64_t next = 0;
    for (int64_t t = 0; t < args_.num_tokens; ++t) {
      first_state_[t] = next;
      next += splits_of(t);
    }
  }

  float* partial(int64_t token, int64_t split, int64_t head) const {
    return partial_ + ((first_state_[token] + split) * args_.num_heads + head) * state_floats_;
  }

  void allocate_workspaces() {
    const int threads = pool_.num_threads();
    workspaces_ = scratch_.take<Workspace>(threads);
    for (int i = 0; i < threads; ++i) {
      Workspace& w = workspaces_[i];
      w.keys = scratch_.take<float>(kCacheBlock * width_);
      w.queries = scratch_.take<float>(kRowsPerUnit * width_);
      w.scores = scratch_.take<float>(kRowsPerUnit * kCacheBlock);
      w.rescale = scratch_.take<float>(kRowsPerUnit);
      w.num_keys = scratch_.take<int32_t>(kRowsPerUnit);
      w.maximum = scratch_.take<float>(kRowsPerUnit);
      w.sum = scratch_.take<float>(kRowsPerUnit);
      w.context = scratch_.take<float>(kRowsPerUnit * latent_width_);
      const bool merges = partial_ == nullptr;
      w.all_maximum = merges ? scratch_.take<float>(kRowsPerUnit) : nullptr;
      w.all_sum = merges ? scratch_.take<float>(kRowsPerUnit) : nullptr;
      w.all_context = merges ? scratch_.take<float>(kRowsPerUnit * latent_width_) : nullptr;
    }
  }

  // Rows of a unit are [token][head].
  void run_unit(const Unit& unit, int64_t first_head, const Workspace& w) const {
    const QueryBlock& block = blocks_[unit.block];
    const int64_t heads = std::min(heads_per_unit_, args_.num_heads - first_head);
    load_queries(block, first_head, heads, w);
    for (int32_t split = unit.first_split; split < unit.end_split; ++split) {
      run_split(block, split, heads, w);
      for (int64_t i = 0; i < block.num_tokens; ++i) {
        const int64_t token = block.first_token + i;
        if (split >= splits_of(token)) continue;
        for (int64_t h = 0; h < heads; ++h) {
          const int64_t row = i * heads + h;
          if (partial_ != nullptr) {
            save_state(w, row, partial(token, split, first_head + h));
          } else {
            merge_state(w, row, split);
          }
        }
      }
    }
    if (partial_ != nullptr) return;
    for (int64_t row = 0; row < block.num_tokens * heads; ++row) {
      finish(block.first_token + row / heads, first_head + row % heads, w.all_sum[row],
             w.all_context + row * latent_width_);
    }
  }

  void load_queries(const QueryBlock& block, int64_t first_head, int64_t heads, const Workspace& w) const {
    const int64_t latent = args_.cache.latent_dim, rope = args_.cache.rope_dim;
    for (int64_t row = 0; row < block.num_tokens * heads; ++row) {
      const int64_t source = (block.first_token + row / heads) * args_.num_heads + first_head + row % heads;
      float* target = w.queries + row * width_;
      ops_.decode(args_.q_latent + source * latent, latent, CacheFormat::kF32, target);
      ops_.decode(args_.q + (source + 1) * args_.head_dim - rope, rope, CacheFormat::kF32, target + latent_width_);
    }
  }

  void run_split(const QueryBlock& block, int32_t split, int64_t heads, const Workspace& w) const {
    const int32_t num_rows = static_cast<int32_t>(block.num_tokens * heads);
    std::fill_n(w.maximum, num_rows, -std::numeric_limits<float>::infinity());
    std::fill_n(w.sum, num_rows, 0.0f);
    std::fill_n(w.context, num_rows * latent_width_, 0.0f);
    const AttentionTile tile{w.keys, w.queries, width_, latent_width_, w.num_keys, num_rows, args_.scale,
                             w.scores, w.rescale, w.maximum, w.sum, w.context};
    for (int32_t first_key = split * kKeySplit; first_key < (split + 1) * kKeySplit; first_key += kCacheBlock) {
      int32_t most = 0;
      for (int32_t row = 0; row < num_rows; ++row) {
        const int32_t position = args_.positions[block.first_token + row / heads];
        w.num_keys[row] = std::clamp(position + 1 - first_key, 0, kCacheBlock);
        most = std::max(most, w.num_keys[row]);
      }
      if (most == 0) break;
      load_keys(block.sequence, first_key / kCacheBlock, most, w.keys);
      ops_.attend(tile);
    }
  }

  void load_keys(int32_t sequence, int32_t index, int32_t count, float* keys) const {
    const int64_t id = args_.block_tables[sequence * args_.block_table_stride + index];
    for (int32_t k = 0; k < count; ++k) load_key(id * kCacheBlock + k, keys + k * width_);
  }

  void load_key(int64_t slot, float* key) const {
    const LatentCache& cache = args_.cache;
    const int64_t latent = cache.latent_dim;
    if (cache.format == CacheFormat::kQ8_0) {
      const int8_t* codes = cache.codes(slot);
      const uint16_t* scales = cache.scales(slot);
      ops_.decode_q8(codes, scales, latent, key);
      ops_.decode_q8(codes + latent, scales + latent / kScaleBlock, cache.rope_dim, key + latent_width_);
      return;
    }
    const uint8_t* row = cache.row(slot);
    ops_.decode(row, latent, cache.format, key);
    ops_.decode(row + latent * cache.element_bytes(), cache.rope_dim, cache.format, key + latent_width_);
  }

  void save_state(const Workspace& w, int64_t row, float* target) const {
    target[0] = w.maximum[row];
    target[1] = w.sum[row];
    memcpy(target + 2, w.context + row * latent_width_, latent_width_ * sizeof(float));
  }

  void merge_state(const Workspace& w, int64_t row, int32_t split) const {
    const float* context = w.context + row * latent_width_;
    float* all_context = w.all_context + row * latent_width_;
    if (split > 0) {
      ops_.merge(&w.all_maximum[row], &w.all_sum[row], all_context, w.maximum[row], w.sum[row], context,
                 latent_width_);
      return;
    }
    w.all_maximum[row] = w.maximum[row];
    w.all_sum[row] = w.sum[row];
    memcpy(all_context, context, latent_width_ * sizeof(float));
  }

  void merge_partials(int64_t token, int64_t head) const {
    float* state = partial(token, 0, head);
    for (int32_t split = 1; split < splits_of(token); ++split) {
      const float* later = partial(token, split, head);
      ops_.merge(&state[0], &state[1], state + 2, later[0], later[1], later + 2, latent_width_);
    }
    finish(token, head, state[1], state + 2);
  }

  void finish(int64_t token, int64_t head, float sum, const float* context) const {
    const int64_t latent = args_.cache.latent_dim;
    ops_.divide(context, sum, latent, args_.out + (token * args_.num_heads + head) * latent);
  }

  ThreadPool& pool_;
  const MlaAttentionArgs& args_;
  const OpsTable& ops_;
  Scratch& scratch_;
  const int64_t latent_width_, width_, state_floats_;
  int64_t heads_per_unit_ = 0, tokens_per_block_ = 0;
  QueryBlock* blocks_ = nullptr;
  int64_t num_blocks_ = 0;
  Unit* units_ = nullptr;
  int64_t num_units_ = 0;
  Workspace* workspaces_ = nullptr;
  float* partial_ = nullptr;
  int64_t* first_state_ = nullptr;
};

[[noreturn]] void refuse(const std::string& problem) { throw std::invalid_argument(problem); }

std::string number(int64_t n) { return std::to_string(n); }

void check_cache(const LatentCache& cache, int64_t head_dim, const char* operation) {
  if (cache.latent_dim < 1 || cache.rope_dim < 2 || cache.rope_dim % 2 != 0 || cache.num_blocks < 1) {
    refuse(std::string(operation) + ": a latent cache needs at least one block, one latent column and an even rope_dim; found " +
           number(cache.num_blocks) + " blocks, latent_dim " + number(cache.latent_dim) + ", rope_dim " +
           number(cache.rope_dim));
  }
  if (cache.format == CacheFormat::kQ8_0 && cache.latent_dim % kScaleBlock != 0) {
    refuse(std::string(operation) + ": a q8_0 cache needs a latent_dim that is a multiple of " + number(kScaleBlock) +
           ", found " + number(cache.latent_dim));
  }
  if (head_dim < cache.rope_dim) {
    refuse(std::string(operation) + ": a query head of " + number(head_dim) + " columns cannot end in rope_dim " +
           number(cache.rope_dim));
  }
}

void check_sequence(const MlaAttentionArgs& args, int64_t s) {
  const int64_t begin = args.query_start[s], end = args.query_start[s + 1];
  if (begin > end || end > args.num_tokens) {
    refuse("mla_attention: query_start must ascend from 0 to " + number(args.num_tokens) + "; entries " + number(s) +
           " and " + number(s + 1) + " are " + number(begin) + " and " + number(end));
  }
  int32_t last = -1;
  for (int64_t t = begin; t < end; ++t) {
    const int32_t position = args.positions[t];
    if (position < 0 || position >= args.seq_lens[s]) {
      refuse("mla_attention: token " + number(t) + " has position " + number(position) + " in sequence " + number(s) +
             ", which has " + number(args.seq_lens[s]) + " tokens in the cache");
    }
    last = std::max(last, position);
  }
  const int64_t needed = last < 0 ? 0 : last / kCacheBlock + 1;
  if (needed > args.block_table_stride) {
    refuse("mla_attention: sequence " + number(s) + " needs " + number(needed) + " blocks; its block table has " +
           number(args.block_table_stride) + " entries");
  }
  for (int64_t b = 0; b < needed; ++b) {
    const int64_t id = args.block_tables[s * args.block_table_stride + b];
    if (id < 0 || id >= args.cache.num_blocks) {
      refuse("mla_attention: entry " + number(b) + " of the block table of sequence " + number(s) + " is " +
             number(id) + "; the cache has " + number(args.cache.num_blocks) + " blocks");
    }
  }
}

}  // namespace

void mla_attention(ThreadPool& pool, const MlaAttentionArgs& args) {
  if (args.num_tokens == 0) return;
  check_cache(args.cache, args.head_dim, "mla_attention");
  if (args.num_heads < 1) refuse("mla_attention: num_heads must be at least 1, found " + number(args.num_heads));
  if (args.query_start[0] != 0 || args.query_start[args.num_sequences] != args.num_tokens) {
    refuse("mla_attention: query_start must ascend from 0 to " + number(args.num_tokens) + "; found " +
           number(args.query_start[0]) + " to " + number(args.query_start[args.num_sequences]));
  }
  for (int64_t s = 0; s < args.num_sequences; ++s) check_sequence(args, s);
  Attention(pool, args).run();
}

void mla_append(ThreadPool& pool, const MlaAppendArgs& args) {
  check_cache(args.cache, args.head_dim, "mla_append");
  const LatentCache& cache = args.cache;
  for (int64_t t = 0; t < args.num_tokens; ++t) {
    if (args.positions[t] < 0 || args.positions[t] >= args.max_positions) {
      refuse("mla_append: token " + number(t) + " has position " + number(args.positions[t]) +
             "; the rotary table covers " + number(args.max_positions));
    }
    if (args.slot_mapping[t] < -1 || args.slot_mapping[t] >= cache.num_blocks * kCacheBlock) {
      refuse("mla_append: token " + number(t) + " is to be stored at slot " + number(args.slot_mapping[t]) +
             "; the cache has " + number(cache.num_blocks * kCacheBlock) + " slots");
    }
  }
  const OpsTable& ops = ops_table(current_isa());
  Scratch& scratch = Scratch::fresh();
  const int64_t width = cache.latent_dim + cache.rope_dim, row_floats = pad16(width);
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
    const int64_t slot = args.slot_mapping[t];
    if (cache.format == CacheFormat::kQ8_0) {
      ops.encode_q8(row, width, cache.codes(slot), cache.scales(slot));
    } else {
      ops.encode(row, width, cache.format, cache.row(slot));
    }
  });
}

}  // namespace hybrid
