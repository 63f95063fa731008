#include "flash_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "ops.h"
#include "scratch.h"

namespace hybrid {
namespace {

constexpr int64_t kRowsPerUnit = 128;          // (token, head) pairs that share a block of keys as it is multiplied
constexpr int64_t kMostStateFloats = 8 << 20;  // states kept at once: 32 MiB

int64_t pad(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Consecutive tokens of one sequence that are worked on together.
struct QueryBlock {
  int32_t sequence, first_token, num_tokens, num_splits;
  int64_t first_state;  // of the block's states that are kept apart
};

// One unit of work: some heads of a query block over splits [first_split, end_split).
struct Unit {
  int32_t block, first_split, end_split;
};

// What a worker keeps while it runs a unit.
template <class Number>
struct Workspace {
  Number *keys, *value_rows, *values, *queries, *weights;
  float *key_units[2], *value_units, *query_units[2];
  float *scores, *rescale, *weight_units;
  int32_t* lane_keys;
  float *states, *all_states;  // of the split at hand, and of the splits merged so far
};

template <class Number>
const AttentionOps<Number>& attention_ops(const OpsTable& ops) {
  if constexpr (std::is_same_v<Number, float>) {
    return ops.floats;
  } else {
    return ops.words;
  }
}

template <class Number>
class FlashAttention {
  using Workspace = hybrid::Workspace<Number>;

 public:
  FlashAttention(ThreadPool& pool, const QueryRows& rows, const AttentionSource& source, float scale, float* out)
      : pool_(pool),
        rows_(rows),
        source_(source),
        scale_(scale),
        out_(out),
        ops_(ops_table(current_isa())),
        attention_(attention_ops<Number>(ops_)),
        scratch_(Scratch::fresh()),
        num_panels_{ceil_div(source.key_dims[0], kPanel), ceil_div(source.key_dims[1], kPanel)},
        query_numbers_((num_panels_[0] + num_panels_[1]) * kPanel * kLanes),
        num_columns_(pad(source.value_dim, 32)),
        state_floats_((2 + num_columns_) * kLanes),
        heads_per_key_(rows.num_heads / source.num_kv_heads) {}

  void run() {
    heads_per_unit_ = std::min(heads_per_key_, kRowsPerUnit);
    find_query_blocks();
    choose_units();
    allocate_workspaces();
    const int64_t parts = source_.num_kv_heads * head_parts();
    pool_.parallel_for(num_units_ * parts, [&](int64_t index, int worker) {
      run_unit(units_[index / parts], index % parts, workspaces_[worker]);
    });
    if (kept_ == nullptr) return;
    pool_.parallel_for(num_blocks_ * parts * groups_per_unit_, [&](int64_t index, int) {
      merge_kept(blocks_[index / (parts * groups_per_unit_)], index / groups_per_unit_ % parts, index % groups_per_unit_);
    });
  }

 private:
  int64_t head_parts() const { return ceil_div(heads_per_key_, heads_per_unit_); }
  int32_t splits_of(int64_t token) const { return rows_.positions[token] / kKeySplit + 1; }

  void find_query_blocks() {
    const int64_t tokens_per_block = std::max<int64_t>(1, kRowsPerUnit / heads_per_unit_);
    blocks_ = scratch_.take<QueryBlock>(rows_.num_tokens);
    for (int64_t s = 0; s < rows_.num_sequences; ++s) {
      int32_t token = rows_.query_start[s];
      while (token < rows_.query_start[s + 1]) {
        const int64_t left = rows_.query_start[s + 1] - token;
        const int32_t count = static_cast<int32_t>(std::min(left, tokens_per_block));
        int32_t splits = 0;
        for (int32_t i = 0; i < count; ++i) splits = std::max(splits, splits_of(token + i));
        blocks_[num_blocks_++] = {static_cast<int32_t>(s), token, count, splits, 0};
        most_tokens_ = std::max<int64_t>(most_tokens_, count);
        token += count;
      }
    }
  }

  // A unit per split where the states fit, else a unit merges all splits of its block itself. The arithmetic is
  // the same.
  void choose_units() {
    int64_t split_units = 0;
    for (int64_t b = 0; b < num_blocks_; ++b) split_units += blocks_[b].num_splits;
    groups_per_unit_ = ceil_div(most_tokens_ * heads_per_unit_, kLanes);
    const int64_t states = split_units * source_.num_kv_heads * head_parts() * groups_per_unit_;
    const bool apart = states * state_floats_ <= kMostStateFloats;
    num_units_ = apart ? split_units : num_blocks_;
    const int64_t wanted = 4 * static_cast<int64_t>(pool_.num_threads());
    while (num_units_ * source_.num_kv_heads * head_parts() < wanted && heads_per_unit_ >= 2 * kLanes) {
      heads_per_unit_ = pad(ceil_div(heads_per_unit_, 2), kLanes);
    }
    groups_per_unit_ = ceil_div(most_tokens_ * heads_per_unit_, kLanes);
    if (apart) allocate_kept();
    units_ = scratch_.take<Unit>(num_units_);
    Unit* unit = units_;
    for (int32_t b = 0; b < num_blocks_; ++b) {
      const int32_t step = apart ? 1 : blocks_[b].num_splits;
      for (int32_t s = 0; s < blocks_[b].num_splits; s += step) *unit++ = {b, s, s + step};
    }
  }

  // Kept states stand as [block][part][group][split].
  void allocate_kept() {
    int64_t next = 0;
    for (int64_t b = 0; b < num_blocks_; ++b) {
      blocks_[b].first_state = next;
      next += source_.num_kv_heads * head_parts() * groups_per_unit_ * blocks_[b].num_splits;
    }
    kept_ = scratch_.take<float>(next * state_floats_);
  }

  float* kept(const QueryBlock& block, int64_t part, int64_t group, int64_t split) const {
    return kept_ + (block.first_state + (part * groups_per_unit_ + group) * block.num_splits + split) * state_floats_;
  }

  void allocate_workspaces() {
    const int threads = pool_.num_threads();
    const int64_t panels = num_panels_[0] + num_panels_[1], groups = groups_per_unit_;
    workspaces_ = scratch_.take<Workspace>(threads);
    for (int i = 0; i < threads; ++i) {
      Workspace& w = workspaces_[i];
      w.keys = scratch_.take<Number>(panels * kPanelStride);
      w.value_rows = source_.values_are_keys
                         ? w.keys
                         : scratch_.take<Number>(ceil_div(source_.value_dim, kPanel) * kPanelStride);
      w.values = scratch_.take<Number>(num_columns_ / 16 * kValueTileStride);
      w.queries = scratch_.take<Number>(groups * query_numbers_);
      w.weights = scratch_.take<Number>(kKeyBlock * kLanes);
      for (int part = 0; part < 2; ++part) {
        w.key_units[part] = scratch_.take<float>(kKeyBlock);
        w.query_units[part] = scratch_.take<float>(groups * kLanes);
      }
      w.value_units = scratch_.take<float>(kKeyBlock);
      w.scores = scratch_.take<float>(kKeyBlock * kLanes);
      w.rescale = scratch_.take<float>(kLanes);
      w.weight_units = scratch_.take<float>(kLanes);
      w.lane_keys = scratch_.take<int32_t>(kLanes);
      w.states = scratch_.take<float>(groups * state_floats_);
      w.all_states = kept_ != nullptr ? nullptr : scratch_.take<float>(groups * state_floats_);
    }
  }

  // The rows of a unit, [token][head], fill the lanes of its groups one after another.
  struct UnitRows {
    const QueryBlock& block;
    int64_t kv_head, first_head, num_heads;

    int64_t count() const { return block.num_tokens * num_heads; }
    int64_t token(int64_t row) const { return block.first_token + row / num_heads; }
    int64_t head(int64_t row) const { return first_head + row % num_heads; }
  };

  UnitRows rows_of(const QueryBlock& block, int64_t part) const {
    const int64_t kv_head = part / head_parts(), offset = part % head_parts() * heads_per_unit_;
    return {block, kv_head, kv_head * heads_per_key_ + offset, std::min(heads_per_unit_, heads_per_key_ - offset)};
  }

  void run_unit(const Unit& unit, int64_t part, const Workspace& w) const {
    const QueryBlock& block = blocks_[unit.block];
    const UnitRows rows = rows_of(block, part);
    const int64_t groups = ceil_div(rows.count(), kLanes);
    load_queries(rows, groups, w);
    for (int32_t split = unit.first_split; split < unit.end_split; ++split) {
      run_split(rows, split, groups, w);
      for (int64_t group = 0; group < groups; ++group) {
        const float* state = w.states + group * state_floats_;
        float* all = kept_ != nullptr ? kept(block, part, group, split) : w.all_states + group * state_floats_;
        if (kept_ == nullptr && split > 0) {
          ops_.merge(all, state, num_columns_);
        } else {
          std::copy_n(state, state_floats_, all);
        }
      }
    }
    if (kept_ != nullptr) return;
    for (int64_t group = 0; group < groups; ++group) finish(rows, group, w.all_states + group * state_floats_);
  }

  void load_queries(const UnitRows& rows, int64_t groups, const Workspace& w) const {
    std::fill_n(w.queries, groups * query_numbers_, Number{0});
    for (int part = 0; part < 2; ++part) std::fill_n(w.query_units[part], groups * kLanes, 0.0f);
    for (int64_t row = 0; row < rows.count(); ++row) {
      Number* lane = w.queries + row / kLanes * query_numbers_ + row % kLanes * kStep<Number>;
      for (int part = 0; part < 2 && source_.key_dims[part] > 0; ++part) {
        const float* query = source_.query(rows.token(row), rows.head(row), part);
        w.query_units[part][row] = attention_.fix_query(query, source_.key_dims[part], lane) * scale_;
        lane += num_panels_[part] * kPanel * kLanes;
      }
    }
  }

  void run_split(const UnitRows& rows, int32_t split, int64_t groups, const Workspace& w) const {
    for (int64_t group = 0; group < groups; ++group) {
      float* state = w.states + group * state_floats_;
      std::fill_n(state, kLanes, -std::numeric_limits<float>::infinity());
      std::fill_n(state + kLanes, state_floats_ - kLanes, 0.0f);
    }
    const int32_t end = std::min(last_position(rows.block) + 1, (split + 1) * kKeySplit);
    for (int32_t first_key = split * kKeySplit; first_key < end; first_key += kKeyBlock) {
      const int32_t count = std::min(end - first_key, kKeyBlock);
      const bool unexpected = first_key == split * kKeySplit;  // nothing asked for these keys yet
      load_block(rows, first_key, count, unexpected, w);
      for (int64_t group = 0; group < groups; ++group) {
        attend(rows, first_key, group, w, group == 0 ? std::min(end - first_key - count, kKeyBlock) : 0);
      }
    }
  }

  int32_t last_position(const QueryBlock& block) const {
    int32_t last = 0;
    for (int32_t i = 0; i < block.num_tokens; ++i) last = std::max(last, rows_.positions[block.first_token + i]);
    return last;
  }

  int64_t slot(const QueryBlock& block, int32_t position) const {
    const int32_t* table = rows_.block_tables + block.sequence * rows_.block_table_stride;
    return int64_t{table[position / kCacheBlock]} * kCacheBlock + position % kCacheBlock;
  }

  void prefetch(int64_t slot, int64_t kv_head) const {
    for (int part = 0; part < 2 && source_.key_dims[part] > 0; ++part) source_.key(kv_head, part).prefetch(slot);
    if (!source_.values_are_keys) source_.value(kv_head).prefetch(slot);
  }

  void load_block(const UnitRows& rows, int32_t first_key, int32_t count, bool unexpected, const Workspace& w) const {
    constexpr int32_t kAhead = 8;
    for (int32_t key = 0; key < count; ++key) {
      if (unexpected && key + kAhead < count) prefetch(slot(rows.block, first_key + key + kAhead), rows.kv_head);
      const int64_t at = slot(rows.block, first_key + key);
      Number* numbers = w.keys + key * kPanel;
      for (int part = 0; part < 2 && source_.key_dims[part] > 0; ++part) {
        w.key_units[part][key] = source_.key(rows.kv_head, part).fix(ops_, at, numbers, kPanelStride);
        numbers += num_panels_[part] * kPanelStride;
      }
      // A value that is not finite has a key that is not, or counts with the weight of its own: NaN.
      const float unit = source_.values_are_keys
                             ? w.key_units[0][key]
                             : source_.value(rows.kv_head).fix(ops_, at, w.value_rows + key * kPanel, kPanelStride);
      if (std::isnan(unit)) w.key_units[0][key] = unit;
      w.value_units[key] = std::isnan(unit) ? 0.0f : unit;
    }
    attention_.pair_values(w.value_rows, count, num_columns_ / 16, w.values);
  }

  // Brings the state of a group forward by a block of keys. Meanwhile the first `ahead` keys after it are
  // asked for.
  void attend(const UnitRows& rows, int32_t first_key, int64_t group, const Workspace& w, int32_t ahead) const {
    int32_t most = 0;
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t row = group * kLanes + lane;
      const int32_t sees = row < rows.count() ? rows_.positions[rows.token(row)] + 1 - first_key : 0;
      w.lane_keys[lane] = std::clamp(sees, 0, kKeyBlock);
      most = std::max(most, w.lane_keys[lane]);
    }
    if (most == 0) return;
    const FlashTile<Number> tile{.keys = w.keys,
                                 .num_panels = {num_panels_[0], num_panels_[1]},
                                 .key_units = {w.key_units[0], w.key_units[1]},
                                 .queries = w.queries + group * query_numbers_,
                                 .query_units = {w.query_units[0] + group * kLanes, w.query_units[1] + group * kLanes},
                                 .values = w.values,
                                 .value_units = w.value_units,
                                 .num_value_tiles = num_columns_ / 16,
                                 .num_keys = most,
                                 .lane_keys = w.lane_keys,
                                 .scores = w.scores,
                                 .weights = w.weights,
                                 .rescale = w.rescale,
                                 .weight_units = w.weight_units,
                                 .state = w.states + group * state_floats_};
    constexpr int32_t kKeysAtOnce = 16;
    for (int32_t key = 0; key < most; key += kKeysAtOnce) {
      attention_.score(tile, key, std::min(key + kKeysAtOnce, most));
      for (int32_t k = key; k < std::min(key + kKeysAtOnce, ahead); ++k) {
        prefetch(slot(rows.block, first_key + kKeyBlock + k), rows.kv_head);
      }
    }
    attention_.soften(tile);
    attention_.gather(tile);
  }

  void merge_kept(const QueryBlock& block, int64_t part, int64_t group) const {
    const UnitRows rows = rows_of(block, part);
    if (group * kLanes >= rows.count()) return;
    float* state = kept(block, part, group, 0);
    for (int32_t split = 1; split < block.num_splits; ++split) {
      ops_.merge(state, kept(block, part, group, split), num_columns_);
    }
    finish(rows, group, state);
  }

  void finish(const UnitRows& rows, int64_t group, float* state) const {
    ops_.finish(state, num_columns_);
    const int64_t lanes = std::min<int64_t>(kLanes, rows.count() - group * kLanes);
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const int64_t row = group * kLanes + lane;
      float* target = out_ + (rows.token(row) * rows_.num_heads + rows.head(row)) * source_.value_dim;
      const float* columns = state + 2 * kLanes + lane;
      for (int64_t i = 0; i < source_.value_dim; ++i) target[i] = columns[i * kLanes];
    }
  }

  ThreadPool& pool_;
  const QueryRows& rows_;
  const AttentionSource& source_;
  const float scale_;
  float* const out_;
  const OpsTable& ops_;
  const AttentionOps<Number>& attention_;
  Scratch& scratch_;
  const int64_t num_panels_[2];
  const int64_t query_numbers_, num_columns_, state_floats_, heads_per_key_;
  int64_t heads_per_unit_ = 0, groups_per_unit_ = 0, most_tokens_ = 0;
  QueryBlock* blocks_ = nullptr;
  int64_t num_blocks_ = 0;
  Unit* units_ = nullptr;
  int64_t num_units_ = 0;
  Workspace* workspaces_ = nullptr;
  float* kept_ = nullptr;
};

[[noreturn]] void refuse(const char* operation, const std::string& problem) {
  throw std::invalid_argument(std::string(operation) + ": " + problem);
}

std::string number(int64_t n) { return std::to_string(n); }

void check_sequence(const char* operation, const QueryRows& rows, int64_t num_blocks, int64_t s) {
  const int64_t begin = rows.query_start[s], end = rows.query_start[s + 1];
  if (begin > end || end > rows.num_tokens) {
    refuse(operation, "query_start must ascend from 0 to " + number(rows.num_tokens) + "; entries " + number(s) +
                          " and " + number(s + 1) + " are " + number(begin) + " and " + number(end));
  }
  int32_t last = -1;
  for (int64_t t = begin; t < end; ++t) {
    const int32_t position = rows.positions[t];
    if (position < 0 || position >= rows.seq_lens[s]) {
      refuse(operation, "token " + number(t) + " has position " + number(position) + " in sequence " + number(s) +
                            ", which has " + number(rows.seq_lens[s]) + " tokens in the cache");
    }
    last = std::max(last, position);
  }
  const int64_t needed = last < 0 ? 0 : last / kCacheBlock + 1;
  if (needed > rows.block_table_stride) {
    refuse(operation, "sequence " + number(s) + " needs " + number(needed) + " blocks; its block table has " +
                          number(rows.block_table_stride) + " entries");
  }
  for (int64_t b = 0; b < needed; ++b) {
    const int64_t id = rows.block_tables[s * rows.block_table_stride + b];
    if (id < 0 || id >= num_blocks) {
      refuse(operation, "entry " + number(b) + " of the block table of sequence " + number(s) + " is " + number(id) +
                            "; the cache has " + number(num_blocks) + " blocks");
    }
  }
}

}  // namespace

void check_rows(const char* operation, const QueryRows& rows, int64_t num_blocks) {
  if (rows.num_heads < 1) refuse(operation, "num_heads must be at least 1, found " + number(rows.num_heads));
  if (rows.query_start[0] != 0 || rows.query_start[rows.num_sequences] != rows.num_tokens) {
    refuse(operation, "query_start must ascend from 0 to " + number(rows.num_tokens) + "; found " +
                          number(rows.query_start[0]) + " to " + number(rows.query_start[rows.num_sequences]));
  }
  for (int64_t s = 0; s < rows.num_sequences; ++s) check_sequence(operation, rows, num_blocks, s);
}

void flash_attention(ThreadPool& pool, const QueryRows& rows, const AttentionSource& source, float scale, float* out) {
  if (source.key(0, 0).rows->format == CacheFormat::kF32) {
    FlashAttention<float>(pool, rows, source, scale, out).run();
  } else {
    FlashAttention<int16_t>(pool, rows, source, scale, out).run();
  }
}

}  // namespace hybrid
