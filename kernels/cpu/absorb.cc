#include "absorb.h"

#include <algorithm>

#include "linear.h"
#include "ops.h"
#include "scratch.h"

namespace hybrid {
namespace {

constexpr int64_t kTileColumns = 256;  // a multiple of every format's block
constexpr int64_t kTileTokens = 64;

// What a worker keeps for a tile. Inputs and sums stand side by side: in `x` and `out` the tokens may be a
// power of two apart, where they would fall into the same cache lines.
struct Workspace {
  float* weights;  // [kGroupRows][kTileColumns]
  float* inputs;   // [kTileTokens][rows]
  float* sums;     // [kTileTokens][kTileColumns]
};

// A matrix of the stack, a range of its columns, and where they stand in a group.
struct Tile {
  const PackedMatrix& matrix;
  GroupExpand expand;
  int64_t b, col, width;
  int reader;

  const uint8_t* group(int64_t index) const { return matrix.group(b, index, reader); }

  // The tile's part of a group is short and far from the next one's: ask for it early.
  void prefetch(int64_t index) const {
    if (index >= matrix.num_groups()) return;
    const uint8_t* start = group(index) + col * matrix.group_bytes() / matrix.cols();
    for (int64_t i = 0; i < width * matrix.group_bytes() / matrix.cols(); i += 64) __builtin_prefetch(start + i);
  }
};

void multiply_tile(const OpsTable& ops, const Tile& tile, int64_t num_tokens, const Workspace& w) {
  const int64_t rows = tile.matrix.rows();
  std::fill_n(w.sums, num_tokens * kTileColumns, 0.0f);
  for (int64_t row = 0; row < rows; row += kGroupRows) {
    tile.prefetch(row / kGroupRows + 1);
    tile.expand(tile.group(row / kGroupRows), tile.matrix.cols(), tile.col, tile.width, w.weights, kTileColumns);
    const int32_t count = static_cast<int32_t>(std::min<int64_t>(kGroupRows, rows - row));
    for (int64_t t = 0; t < num_tokens; ++t) {
      ops.accumulate(w.weights, kTileColumns, w.inputs + t * rows + row, count, tile.width, w.sums + t * kTileColumns);
    }
  }
}

}  // namespace

void linear_transposed_batched(ThreadPool& pool, const PackedMatrix& matrix, const float* x, int64_t num_tokens,
                               int64_t x_token_stride, int64_t x_batch_stride, float* out, int64_t out_token_stride,
                               int64_t out_batch_stride) {
  check_product("linear_transposed_batched", matrix, matrix.rows(), matrix.cols(),
                {x, num_tokens, x_token_stride, x_batch_stride, out, out_token_stride, out_batch_stride});
  const OpsTable& ops = ops_table(current_isa());
  const GroupExpand expand = kernel_for(matrix).expand;
  const int64_t cols = matrix.cols(), tiles = (cols + kTileColumns - 1) / kTileColumns;
  Scratch& scratch = Scratch::fresh();
  Workspace* workspaces = scratch.take<Workspace>(pool.num_threads());
  for (int i = 0; i < pool.num_threads(); ++i) {
    workspaces[i] = {scratch.take<float>(kGroupRows * kTileColumns), scratch.take<float>(kTileTokens * matrix.rows()),
                     scratch.take<float>(kTileTokens * kTileColumns)};
  }
  auto work = [&](int64_t unit, int worker) {
    const int64_t b = unit / tiles, col = unit % tiles * kTileColumns;
    const Tile tile{matrix, expand, b, col, std::min(kTileColumns, cols - col), pool.group_of(worker)};
    const Workspace& w = workspaces[worker];
    for (int64_t first = 0; first < num_tokens; first += kTileTokens) {
      const int64_t count = std::min(kTileTokens, num_tokens - first);
      for (int64_t t = 0; t < count; ++t) {
        std::copy_n(x + (first + t) * x_token_stride + b * x_batch_stride, matrix.rows(), w.inputs + t * matrix.rows());
      }
      multiply_tile(ops, tile, count, w);
      for (int64_t t = 0; t < count; ++t) {
        std::copy_n(w.sums + t * kTileColumns, tile.width, out + (first + t) * out_token_stride + b * out_batch_stride + col);
      }
    }
  };
  // A tile has columns of all rows: where those are divided, every tile has some far ones.
  if (matrix.division() == Division::kCopies) {
    pool.parallel_for_divided(pool.split(matrix.batch() * tiles), work);
  } else if (matrix.division() == Division::kBatch) {
    UnitRanges ranges;
    for (const PackedMatrix::Part& part : matrix.parts()) ranges.add((part.batch_end - part.batch_start) * tiles);
    pool.parallel_for_divided(ranges, work);
  } else {
    pool.parallel_for(matrix.batch() * tiles, work);
  }
}

}  // namespace hybrid
