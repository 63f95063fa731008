// Gathering the activation rows of a few tokens into the tile that products with many tokens read.
#pragma once
#include <cstdint>

#include "kernel_abi.h"
#include "scratch.h"

namespace hybrid {

// From this many tokens on gathering and expanding pay.
inline constexpr int64_t kTileWorthwhile = 8;

// Room for one tile of each worker.
class TokenTiles {
 public:
  TokenTiles(Scratch& scratch, int num_workers, int64_t max_tokens, int64_t cols);

  // Fills the worker's tile with rows token_ids[0 .. num_tokens) of x, or the first rows without ids; rows of `cols`
  // columns, which are at most those there is room for, or of all.
  TokenTile gather(int worker, const Activations& x, const int32_t* token_ids, int64_t num_tokens) const {
    return gather(worker, x, token_ids, num_tokens, cols_);
  }
  TokenTile gather(int worker, const Activations& x, const int32_t* token_ids, int64_t num_tokens, int64_t cols) const;

 private:
  int64_t cols_, max_rows_;  // rows of all blocks of a tile
  int8_t* q8_;
  float* scale_;
  int16_t* sum16_;
};

}  // namespace hybrid
