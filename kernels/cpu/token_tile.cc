#include "token_tile.h"

#include <algorithm>
#include <cstring>

namespace hybrid {
namespace {

int64_t padded(int64_t num_tokens) { return (num_tokens + kTileStep - 1) / kTileStep * kTileStep; }

}  // namespace

TokenTiles::TokenTiles(Scratch& scratch, int num_workers, int64_t max_tokens, int64_t cols)
    : cols_(cols),
      max_rows_((cols + kActBlock - 1) / kActBlock * padded(std::min<int64_t>(max_tokens, kMostTileTokens))),
      q8_(scratch.take<int8_t>(num_workers * max_rows_ * kActBlock)),
      scale_(scratch.take<float>(num_workers * max_rows_)),
      sum16_(scratch.take<int16_t>(num_workers * max_rows_ * 16)) {}

TokenTile TokenTiles::gather(int worker, const Activations& x, const int32_t* token_ids, int64_t num_tokens,
                              int64_t cols) const {
  const int64_t rows = padded(num_tokens), first = worker * max_rows_, num_blocks = (cols + kActBlock - 1) / kActBlock;
  int8_t* q8 = q8_ + first * kActBlock;
  float* scale = scale_ + first;
  int16_t* sum16 = sum16_ + first * 16;
  for (int64_t t = 0; t < rows; ++t) {
    const bool pads = t >= num_tokens;
    const int64_t token = pads || token_ids == nullptr ? t : token_ids[t];
    for (int64_t b = 0; b < num_blocks; ++b) {
      // Rows of x are zero-padded to a multiple of 64 columns.
      const int64_t left = (cols - b * kActBlock + 63) / 64 * 64, given = pads ? 0 : std::min<int64_t>(left, kActBlock);
      const int64_t row = b * rows + t;
      if (given > 0) {
        std::memcpy(q8 + row * kActBlock, x.q8 + token * x.q8_stride + b * kActBlock, static_cast<size_t>(given));
        std::memcpy(sum16 + row * 16, x.sum16 + token * x.sum_stride + b * 16, static_cast<size_t>(given) / 8);
      }
      std::memset(q8 + row * kActBlock + given, 0, static_cast<size_t>(kActBlock - given));
      std::memset(sum16 + row * 16 + given / 16, 0, static_cast<size_t>(kActBlock - given) / 8);
      scale[row] = pads ? 0.0f : x.scale[token * x.scale_stride + b];
    }
  }
  return {num_tokens, rows, q8, scale, sum16};
}

}  // namespace hybrid
