#include "absorb.h"

#include <algorithm>

#include "linear.h"
#include "ops.h"
#include "scratch.h"

namespace hybrid {
namespace {

constexpr int64_t kTileColumns = 256;  // a multiple of every format's block

}  // namespace

void linear_transposed_batched(ThreadPool& pool, const PackedMatrix& matrix, const float* x, int64_t num_tokens,
                               int64_t x_token_stride, int64_t x_batch_stride, float* out, int64_t out_token_stride,
                               int64_t out_batch_stride) {
  const OpsTable& ops = ops_table(current_isa());
  const GroupExpand expand = kernel_for(matrix).expand;
  const int64_t rows = matrix.rows(), cols = matrix.cols(), tiles = (cols + kTileColumns - 1) / kTileColumns;
  float* weights = Scratch::fresh().take<float>(kGroupRows * kTileColumns * pool.num_threads());
  pool.parallel_for(matrix.batch() * tiles, [&](int64_t unit, int worker) {
    const int64_t b = unit / tiles, col = unit % tiles * kTileColumns, width = std::min(kTileColumns, cols - col);
    const float* input = x + b * x_batch_stride;
    float* output = out + b * out_batch_stride + col;
    float* tile = weights + worker * kGroupRows * kTileColumns;
    for (int64_t t = 0; t < num_tokens; ++t) std::fill_n(output + t * out_token_stride, width, 0.0f);
    for (int64_t row = 0; row < rows; row += kGroupRows) {
      expand(matrix.group(b, row / kGroupRows), cols, col, width, tile, kTileColumns);
      const int32_t count = static_cast<int32_t>(std::min<int64_t>(kGroupRows, rows - row));
      for (int64_t t = 0; t < num_tokens; ++t) {
        ops.accumulate(tile, kTileColumns, input + t * x_token_stride + row, count, width, output + t * out_token_stride);
      }
    }
  });
}

}  // namespace hybrid
