// SwiGLU feed-forward layers: routed experts, and the same code for one dense expert.
//
// For each (token, expert) pair: h = silu(gate x) * up x, y = down h; out = the sum of weight * y in
// top-k order. Where a matrix is quantised, its input is rounded to int8 first, a block of 256 columns
// at a time. No result depends on other tokens, on their order, or on the number of threads.
//
// Passes over the pool: rounding the inputs (on one thread where they are few); gate and up with SwiGLU and
// rounding; down. The sum over experts is part of the last where there are few tokens, else a pass of its own for
// every slice of down's rows.
//
// Divided between NUMA nodes, gate and up are cut by rows and down by columns at the same places, multiples of 256.
// Workers read their node's slices alone; each expert's partial results are added in the order of the slices, which is
// the one difference to a layer that is not divided: copies, and any number of workers, give equal bits.
#pragma once
#include <cstdint>

#include "matrix.h"
#include "thread_pool.h"

namespace hybrid {

struct MoeArgs {
  const float* x;             // [num_tokens][hidden]
  int64_t num_tokens;
  const int32_t* topk_ids;    // [num_tokens][k]; -1: nothing to add. Null: expert 0
  const float* topk_weights;  // [num_tokens][k]. Null: 1, with k = 1
  int64_t k;
  float* out;                 // [num_tokens][hidden]
};

// gate and up: [num_experts][intermediate][hidden]; down: [num_experts][hidden][intermediate].
// Throws std::invalid_argument before any work: shapes that do not fit, a format without a kernel,
// an id outside [-1, num_experts).
void moe(ThreadPool& pool, const PackedMatrix& gate, const PackedMatrix& up, const PackedMatrix& down,
         const MoeArgs& args);

// As moe with one expert of weight 1 for every token.
void mlp(ThreadPool& pool, const PackedMatrix& gate, const PackedMatrix& up, const PackedMatrix& down,
         const float* x, int64_t num_tokens, float* out);

}  // namespace hybrid
