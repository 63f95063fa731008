#include "moe.h"

#include <algorithm>
#include <atomic>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "linear.h"
#include "ops.h"
#include "scratch.h"
#include "token_tile.h"

namespace hybrid {
namespace {

constexpr int64_t kPairsPerShare = kMostTileTokens;  // bounds a worker's tile and the reuse of activations in cache
constexpr int64_t kFewPairs = 64;                // up to here the sum over experts is part of the down pass
constexpr int64_t kChunkBytes = int64_t{128} << 20;  // of scratch for a chunk of tokens
constexpr int64_t kSliceBytes = int64_t{64} << 20;   // of down's results kept at once
constexpr int64_t kUnitsPerThread = 4;           // wanted, so that threads end together

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// One of the three weights with the kernel that multiplies by it.
struct Weight {
  const PackedMatrix& matrix;
  const KernelRow& kernel;
  bool rounds_input() const { return kernel.activation == ActFormat::q8; }
  bool takes_tiles(int64_t num_tokens) const { return kernel.gemm != nullptr && num_tokens >= kTileWorthwhile; }

  // Groups that follow one another in memory, `cols` of their columns.
  struct Slice {
    const uint8_t* first;
    int64_t num_groups, group_bytes, cols;
  };

  // 16-row groups [group, end_group) of an expert, for a reader of that group of workers.
  Slice rows(int64_t expert, int64_t group, int64_t end_group, int reader) const {
    return {matrix.group(expert, group, reader), end_group - group, matrix.group_bytes(), matrix.cols()};
  }

  // The same of a part that has some of the columns.
  static Slice columns(const PackedMatrix::Part& part, int64_t expert, int64_t group, int64_t end_group) {
    return {part.group(expert, group), end_group - group, part.group_bytes, part.cols()};
  }

  // Results are written side by side; from `tile` where the kernel takes one.
  void multiply(const Slice& slice, const Activations& x, const int32_t* token_ids, int64_t num_tokens,
                const TokenTile& tile, float* out, int64_t out_stride) const {
    if (takes_tiles(num_tokens)) {
      kernel.gemm(slice.first, slice.num_groups, slice.cols, tile, out, out_stride);
      return;
    }
    for (int64_t g = 0; g < slice.num_groups; ++g) {
      kernel.dot(slice.first + g * slice.group_bytes, slice.cols, x, token_ids, static_cast<int32_t>(num_tokens),
                 out + g * kGroupRows, out_stride);
    }
  }
};

// Pairs [first, end) of one expert, pairs being sorted by expert.
struct Share {
  int32_t expert, first, end;
  int32_t size() const { return end - first; }
};

class Layer {
 public:
  Layer(ThreadPool& pool, const Weight& gate, const Weight& up, const Weight& down, const MoeArgs& args)
      : pool_(pool),
        gate_(gate),
        up_(up),
        down_(down),
        args_(args),
        ops_(ops_table(current_isa())),
        scratch_(Scratch::fresh()),
        num_experts_(gate.matrix.batch()),
        intermediate_(gate.matrix.rows()),
        hidden_size_(down.matrix.rows()),
        num_slices_(down.matrix.division() == Division::kCols ? static_cast<int64_t>(down.matrix.parts().size()) : 1) {}

  void run() {
    sort_pairs();
    if (num_pairs_ == 0) {
      std::fill_n(args_.out, args_.num_tokens * hidden_size_, 0.0f);
      return;
    }
    round_inputs();
    gate_and_up();
    if (num_pairs_ <= kFewPairs && num_slices_ == 1) {
      down_and_sum();
    } else {
      down_by_slices();
    }
  }

 private:
  int32_t expert_of(int64_t slot) const { return args_.topk_ids == nullptr ? 0 : args_.topk_ids[slot]; }

  int64_t groups(int64_t rows) const { return (rows + kGroupRows - 1) / kGroupRows; }

  // A counting sort by expert; within an expert pairs keep the order of the tokens.
  void sort_pairs() {
    const int64_t slots = args_.num_tokens * args_.k;
    int32_t* next = scratch_.take<int32_t>(num_experts_ + 1);
    std::fill_n(next, num_experts_ + 1, 0);
    for (int64_t i = 0; i < slots; ++i) {
      if (expert_of(i) >= 0) ++next[expert_of(i) + 1];
    }
    for (int64_t e = 0; e < num_experts_; ++e) next[e + 1] += next[e];
    num_pairs_ = next[num_experts_];
    shares_ = scratch_.take<Share>(num_experts_ + num_pairs_ / kPairsPerShare + 1);
    for (int32_t e = 0; e < num_experts_; ++e) {
      for (int32_t first = next[e]; first < next[e + 1]; first += kPairsPerShare) {
        const int32_t end = std::min<int32_t>(next[e + 1], first + kPairsPerShare);
        shares_[num_shares_++] = {e, first, end};
      }
    }
    token_of_pair_ = scratch_.take<int32_t>(num_pairs_);
    pair_of_slot_ = scratch_.take<int32_t>(slots);
    for (int64_t i = 0; i < slots; ++i) {
      const int32_t expert = expert_of(i);
      pair_of_slot_[i] = expert < 0 ? -1 : next[expert]++;
      if (expert >= 0) token_of_pair_[pair_of_slot_[i]] = static_cast<int32_t>(i / args_.k);
    }
  }

  void round_inputs() {
    const int64_t cols = gate_.matrix.cols();
    const bool rounds = gate_.rounds_input() || up_.rounds_input();
    const QuantizedRows rows(scratch_, rounds ? args_.num_tokens : 0, cols);
    if (rounds) {
      for_each_token(pool_, args_.num_tokens, cols, [&](int64_t t, int) { rows.quantize(t, args_.x + t * cols); });
      inputs_ = rows.rows();
    }
    inputs_.f32 = args_.x;
    inputs_.f32_stride = cols;
  }

  // Rows a unit takes: as many as leave enough units for the threads.
  int64_t rows_of_unit(int64_t rows, int64_t others) const {
    int64_t taken = kActBlock;
    while (taken > kGroupRows && (rows + taken - 1) / taken * others < kUnitsPerThread * pool_.num_threads()) taken /= 2;
    return taken;
  }

  // A unit is some rows of gate and up for a share. Rounding needs 256 rows: a unit that has fewer leaves
  // it to the last of its block.
  void gate_and_up() {
    const int64_t rows = rows_of_unit(intermediate_, num_shares_);
    const bool rounds = down_.rounds_input();
    if (rounds) rounded_.emplace(scratch_, num_pairs_, intermediate_);
    if (!rounds || rows < kActBlock) plain_ = scratch_.take<float>(num_pairs_ * plain_stride_);
    if (rounds && rows < kActBlock) {
      ready_rows_ = scratch_.take<std::atomic<int32_t>>(num_shares_ * num_blocks_);
      for (int64_t i = 0; i < num_shares_ * num_blocks_; ++i) ready_rows_[i].store(0, std::memory_order_relaxed);
    }
    const int64_t tile = kPairsPerShare * rows;
    float* tiles = scratch_.take<float>(2 * tile * pool_.num_threads());
    const TokenTiles inputs = token_tiles(gate_.matrix.cols());
    // The rows of each slice, where gate and up are cut.
    const std::vector<PackedMatrix::Part>& parts = gate_.matrix.parts();
    const bool cut = gate_.matrix.division() == Division::kRows;
    UnitRanges units;
    for (size_t i = 0; i < (cut ? parts.size() : 1); ++i) {
      const int64_t length = cut ? parts[i].num_groups() * kGroupRows : plain_stride_;
      units.add(num_shares_ * ((length + rows - 1) / rows));
    }
    for_units(units, cut, copied(gate_) || copied(up_), [&](int64_t unit, int worker) {
      int64_t place;
      const int i = units.find(unit, place);
      const int64_t first = cut ? parts[i].group_start * kGroupRows : 0;
      const int64_t last = cut ? parts[i].group_end * kGroupRows : plain_stride_;
      const int64_t per_share = (last - first + rows - 1) / rows;
      const int64_t s = place / per_share, row = first + place % per_share * rows;
      const int64_t end = std::min(row + rows, last);
      float* gate_tile = tiles + 2 * tile * worker;
      activate(shares_[s], row, end, inputs, worker, gate_tile, gate_tile + tile);
      if (rounds) round_block(s, row, end, gate_tile);
    });
  }

  static bool copied(const Weight& weight) { return weight.matrix.division() == Division::kCopies; }

  // Each range by the workers it belongs to, or all units by everyone, every group its part where it has a copy.
  template <class F>
  void for_units(const UnitRanges& units, bool cut, bool copies, F&& body) {
    if (cut) {
      pool_.parallel_for_divided(units, body);
    } else if (copies) {
      pool_.parallel_for_divided(pool_.split(units.total()), body);
    } else {
      pool_.parallel_for(units.total(), body);
    }
  }

  // Room for the rows of the largest share.
  TokenTiles token_tiles(int64_t cols) const {
    int64_t most = 0;
    for (int64_t s = 0; s < num_shares_; ++s) most = std::max<int64_t>(most, shares_[s].size());
    return TokenTiles(scratch_, most < kTileWorthwhile ? 0 : pool_.num_threads(), most, cols);
  }

  // silu(gate x) * up x, into the plain hidden rows or, without those, into gate_tile ([pairs][end - row]).
  void activate(const Share& share, int64_t row, int64_t end, const TokenTiles& inputs, int worker, float* gate_tile,
                float* up_tile) const {
    const int64_t group = row / kGroupRows, end_group = end / kGroupRows, width = end - row;
    float* target = plain_ == nullptr ? gate_tile : plain_ + share.first * plain_stride_ + row;
    const int64_t stride = plain_ == nullptr ? width : plain_stride_;
    const int32_t* tokens = token_of_pair_ + share.first;
    TokenTile tile;
    if (gate_.takes_tiles(share.size()) || up_.takes_tiles(share.size()))
      tile = inputs.gather(worker, inputs_, tokens, share.size());
    const int reader = pool_.group_of(worker);
    gate_.multiply(gate_.rows(share.expert, group, end_group, reader), inputs_, tokens, share.size(), tile, target, stride);
    up_.multiply(up_.rows(share.expert, group, end_group, reader), inputs_, tokens, share.size(), tile, up_tile, width);
    for (int64_t i = 0; i < share.size(); ++i) {
      ops_.swiglu(target + i * stride, up_tile + i * width, width, target + i * stride);
    }
  }

  // Rounds the 256 columns that rows [row, end) belong to, once all of them are there.
  void round_block(int64_t s, int64_t row, int64_t end, const float* tile) const {
    const Share& share = shares_[s];
    const int64_t block = row / kActBlock, col = block * kActBlock;
    if (ready_rows_ != nullptr) {
      const int64_t wanted = std::min<int64_t>(kActBlock, plain_stride_ - col), done = end - row;
      // Release what was written here; acquire what the block's other units wrote.
      std::atomic<int32_t>& ready = ready_rows_[s * num_blocks_ + block];
      if (ready.fetch_add(static_cast<int32_t>(done), std::memory_order_acq_rel) + done < wanted) return;
    }
    for (int64_t i = 0; i < share.size(); ++i) {
      const float* x = plain_ == nullptr ? tile + i * (end - row) : plain_ + (share.first + i) * plain_stride_ + col;
      rounded_->quantize_columns(share.first + i, col, std::min<int64_t>(kActBlock, intermediate_ - col), x);
    }
  }

  Activations hidden_rows(const Share& share) const {
    if (rounded_) return rounded_->rows(share.first);
    return float_rows(plain_ + share.first * plain_stride_, plain_stride_);
  }

  void multiply_down(const Share& share, int64_t group, int64_t end_group, const TokenTiles& hidden, int worker,
                     float* out, int64_t out_stride) const {
    const Weight::Slice slice = down_.rows(share.expert, group, end_group, pool_.group_of(worker));
    multiply_slice(share, slice, hidden_rows(share), hidden, worker, out, out_stride);
  }

  // The share of the products that a part of down's columns has.
  void multiply_down_part(const Share& share, const PackedMatrix::Part& part, int64_t group, int64_t end_group,
                          const TokenTiles& hidden, int worker, float* out, int64_t out_stride) const {
    Activations rows = hidden_rows(share);
    if (rounded_) {
      rows.q8 += part.col_start;
      rows.scale += part.col_start / kActBlock;
      rows.sum16 += part.col_start / 16;
    } else {
      rows.f32 += part.col_start;
    }
    multiply_slice(share, Weight::columns(part, share.expert, group, end_group), rows, hidden, worker, out, out_stride);
  }

  void multiply_slice(const Share& share, const Weight::Slice& slice, const Activations& rows, const TokenTiles& hidden,
                      int worker, float* out, int64_t out_stride) const {
    TokenTile tile;
    if (down_.takes_tiles(share.size())) tile = hidden.gather(worker, rows, nullptr, share.size(), slice.cols);
    down_.multiply(slice, rows, nullptr, share.size(), tile, out, out_stride);
  }

  // Few pairs: a unit takes some rows of down for all experts and sums them up.
  void down_and_sum() {
    const int64_t rows = rows_of_unit(hidden_size_, 1);
    float* tiles = scratch_.take<float>(num_pairs_ * rows * pool_.num_threads());
    take_row_pointers();
    const TokenTiles hidden = token_tiles(intermediate_);
    UnitRanges units;
    units.add((hidden_size_ + rows - 1) / rows);
    for_units(units, false, copied(down_), [&](int64_t unit, int worker) {
      const int64_t row = unit * rows, end_group = groups(std::min(row + rows, hidden_size_));
      float* tile = tiles + worker * num_pairs_ * rows;
      for (int64_t s = 0; s < num_shares_; ++s) {
        const Share& share = shares_[s];
        multiply_down(share, row / kGroupRows, end_group, hidden, worker, tile + share.first * rows, rows);
      }
      for (int64_t t = 0; t < args_.num_tokens; ++t) {
        sum_token(t, tile, rows, row, std::min(rows, hidden_size_ - row), worker);
      }
    });
  }

  // Many pairs, or down cut by columns: results [num_slices_][num_pairs][slice] are kept for a slice of the rows,
  // then summed.
  void down_by_slices() {
    const int64_t padded = round_up(hidden_size_, kGroupRows);
    const int64_t affordable =
        kSliceBytes / static_cast<int64_t>(sizeof(float)) / (num_pairs_ * num_slices_) / kActBlock * kActBlock;
    const int64_t slice = std::min(padded, std::max<int64_t>(kActBlock, affordable));
    float* results = scratch_.take<float>(num_slices_ * num_pairs_ * slice);
    take_row_pointers();
    const TokenTiles hidden = token_tiles(intermediate_);
    for (int64_t first = 0; first < hidden_size_; first += slice) {
      const int64_t width = std::min(slice, padded - first);
      const int64_t rows = rows_of_unit(width, num_shares_ * num_slices_), per_share = (width + rows - 1) / rows;
      UnitRanges units;
      for (int64_t i = 0; i < num_slices_; ++i) units.add(num_shares_ * per_share);
      for_units(units, num_slices_ > 1, copied(down_), [&](int64_t unit, int worker) {
        int64_t place;
        const int i = units.find(unit, place);
        const Share& share = shares_[place / per_share];
        const int64_t row = place % per_share * rows, group = (first + row) / kGroupRows;
        const int64_t end_group = groups(first + std::min(row + rows, width));
        float* out = results + (i * num_pairs_ + share.first) * slice + row;
        if (num_slices_ == 1) {
          multiply_down(share, group, end_group, hidden, worker, out, slice);
        } else {
          multiply_down_part(share, down_.matrix.parts()[static_cast<size_t>(i)], group, end_group, hidden, worker, out, slice);
        }
      });
      for_each_token(pool_, args_.num_tokens, args_.k * width, [&](int64_t t, int worker) {
        sum_token(t, results, slice, first, std::min(width, hidden_size_ - first), worker);
      });
    }
  }

  void take_row_pointers() {
    rows_of_token_ = scratch_.take<const float*>(args_.k * num_slices_ * pool_.num_threads());
    if (num_slices_ > 1) weights_of_token_ = scratch_.take<float>(args_.k * num_slices_ * pool_.num_threads());
  }

  // out[token, row : row + n] from results [num_slices_][num_pairs][stride]: experts in top-k order, the slices of
  // each in theirs.
  void sum_token(int64_t token, const float* results, int64_t stride, int64_t row, int64_t n, int worker) const {
    const int64_t count = args_.k * num_slices_;
    const float** rows = rows_of_token_ + worker * count;
    for (int64_t i = 0; i < count; ++i) {
      const int32_t pair = pair_of_slot_[token * args_.k + i / num_slices_];
      rows[i] = pair < 0 ? nullptr : results + (i % num_slices_ * num_pairs_ + pair) * stride;
    }
    const float one = 1.0f;
    const float* weights = args_.topk_weights == nullptr ? &one : args_.topk_weights + token * args_.k;
    if (num_slices_ > 1) {
      float* of_slices = weights_of_token_ + worker * count;
      for (int64_t i = 0; i < count; ++i) of_slices[i] = weights[i / num_slices_];
      weights = of_slices;
    }
    ops_.weighted_sum(rows, weights, static_cast<int32_t>(count), n, args_.out + token * hidden_size_ + row);
  }

  ThreadPool& pool_;
  const Weight &gate_, &up_, &down_;
  const MoeArgs& args_;
  const OpsTable& ops_;
  Scratch& scratch_;
  const int64_t num_experts_, intermediate_, hidden_size_;
  int64_t num_pairs_ = 0, num_shares_ = 0;
  Share* shares_ = nullptr;
  int32_t *token_of_pair_ = nullptr, *pair_of_slot_ = nullptr;
  Activations inputs_;
  // The hidden rows, one for each pair: rounded (where down is quantised), plain, or both (where units are
  // smaller than a block; then ready_rows_ [num_shares][num_blocks_] counts the rows done).
  const int64_t plain_stride_ = round_up(intermediate_, kGroupRows), num_blocks_ = (intermediate_ + kActBlock - 1) / kActBlock;
  std::optional<QuantizedRows> rounded_;
  float* plain_ = nullptr;
  std::atomic<int32_t>* ready_rows_ = nullptr;
  // Down's parts, where it is cut by columns.
  const int64_t num_slices_;
  const float** rows_of_token_ = nullptr;
  float* weights_of_token_ = nullptr;
};

[[noreturn]] void refuse(const std::string& problem) { throw std::invalid_argument(problem); }

std::string shape_of(const PackedMatrix& m) {
  return "[" + std::to_string(m.batch()) + ", " + std::to_string(m.rows()) + ", " + std::to_string(m.cols()) + "]";
}

void check_shapes(const PackedMatrix& gate, const PackedMatrix& up, const PackedMatrix& down, const char* operation) {
  const bool alike = gate.batch() == up.batch() && gate.rows() == up.rows() && gate.cols() == up.cols();
  if (!alike || down.batch() != gate.batch() || down.cols() != gate.rows() || down.rows() != gate.cols()) {
    refuse(std::string(operation) + ": gate and up must be [experts, intermediate, hidden] and down [experts, hidden, " +
           "intermediate]; found gate " + shape_of(gate) + ", up " + shape_of(up) + ", down " + shape_of(down));
  }
}

// Slices begin at multiples of 256 columns of the hidden rows, so that each has whole blocks of rounded activations.
void check_division(const PackedMatrix& gate, const PackedMatrix& up, const PackedMatrix& down, const char* operation) {
  const std::string name(operation);
  const auto one_of = [](const PackedMatrix& m, Division cut) {
    return m.division() == Division::kNone || m.division() == Division::kCopies || m.division() == Division::kBatch || m.division() == cut;
  };
  if (!one_of(gate, Division::kRows) || !one_of(up, Division::kRows) || !one_of(down, Division::kCols)) {
    refuse(name + ": gate and up may be cut by rows, down by columns, where a layer is divided between nodes");
  }
  const bool cut = gate.division() == Division::kRows;
  bool alike = cut == (up.division() == Division::kRows) && (!cut || gate.parts().size() == up.parts().size());
  for (size_t i = 0; cut && alike && i < gate.parts().size(); ++i) {
    alike = gate.parts()[i].group_end == up.parts()[i].group_end;
  }
  if (!alike) refuse(name + ": gate and up must be cut at the same rows");
  for (const PackedMatrix* m : {&gate, &down}) {
    for (const PackedMatrix::Part& part : m->parts()) {
      const int64_t start = m == &gate ? part.group_start * kGroupRows : part.col_start;
      if (start % kActBlock != 0) {
        refuse(name + ": slices of the intermediate dimension must begin at a multiple of " + std::to_string(kActBlock) +
               ", found " + std::to_string(start));
      }
    }
  }
}

void check_ids(const MoeArgs& args, int64_t num_experts) {
  for (int64_t i = 0; i < args.num_tokens * args.k; ++i) {
    if (args.topk_ids[i] >= -1 && args.topk_ids[i] < num_experts) continue;
    refuse("moe: topk_ids of token " + std::to_string(i / args.k) + ", slot " + std::to_string(i % args.k) + " is " +
           std::to_string(args.topk_ids[i]) + "; it must be -1 or one of the " + std::to_string(num_experts) + " experts");
  }
}

// Tokens are taken in chunks so that scratch memory stays bounded.
void run_layer(ThreadPool& pool, const PackedMatrix& gate, const PackedMatrix& up, const PackedMatrix& down,
               const MoeArgs& args) {
  const Weight weights[3] = {{gate, kernel_for(gate)}, {up, kernel_for(up)}, {down, kernel_for(down)}};
  const int64_t hidden_bytes = weights[2].rounds_input() ? 2 : 4;
  const int64_t token_bytes = 2 * gate.cols() + args.k * gate.rows() * hidden_bytes;
  const int64_t chunk = std::max(kPairsPerShare, kChunkBytes / token_bytes);
  for (int64_t t = 0; t < args.num_tokens; t += chunk) {
    MoeArgs part = args;
    part.x += t * gate.cols();
    part.num_tokens = std::min(chunk, args.num_tokens - t);
    if (args.topk_ids != nullptr) part.topk_ids += t * args.k;
    if (args.topk_weights != nullptr) part.topk_weights += t * args.k;
    part.out += t * down.rows();
    Layer(pool, weights[0], weights[1], weights[2], part).run();
  }
}

}  // namespace

void moe(ThreadPool& pool, const PackedMatrix& gate, const PackedMatrix& up, const PackedMatrix& down,
         const MoeArgs& args) {
  check_shapes(gate, up, down, "moe");
  check_division(gate, up, down, "moe");
  check_ids(args, gate.batch());
  run_layer(pool, gate, up, down, args);
}

void mlp(ThreadPool& pool, const PackedMatrix& gate, const PackedMatrix& up, const PackedMatrix& down,
         const float* x, int64_t num_tokens, float* out) {
  check_shapes(gate, up, down, "mlp");
  check_division(gate, up, down, "mlp");
  if (gate.batch() != 1) refuse("mlp: takes a single expert, found gate " + shape_of(gate));
  run_layer(pool, gate, up, down,
            {.x = x, .num_tokens = num_tokens, .topk_ids = nullptr, .topk_weights = nullptr, .k = 1, .out = out});
}

}  // namespace hybrid
