// Operations of a model that are not products with quantised matrices.
#pragma once
#include <cstdint>

#include "isa.h"
#include "matrix.h"
#include "ops_table.h"
#include "thread_pool.h"

namespace hybrid {

const OpsTable& ops_table(Isa isa);

// body(token, worker) for every token; on the calling thread alone where the whole is too little
// work (`elements` touched for each token) to wake others.
template <class F>
void for_each_token(ThreadPool& pool, int64_t num_tokens, int64_t elements, F&& body) {
  constexpr int64_t kWorthWaking = 1 << 16;
  if (num_tokens * elements >= kWorthWaking && num_tokens > 1) {
    pool.parallel_for(num_tokens, body);
    return;
  }
  for (int64_t t = 0; t < num_tokens; ++t) body(t, 0);
}

// y = x / sqrt(mean(x^2) + eps) * weight on [num_tokens][dim]. With a residual (null: none):
// residual += x first, in place, and the sum is what is normalised. `out` may be `x`.
void rms_norm(ThreadPool& pool, const float* x, int64_t num_tokens, int64_t dim, const float* weight, float eps,
              float* residual, float* out);

// sums += x, both [num_tokens][dim].
void add(ThreadPool& pool, const float* x, int64_t num_tokens, int64_t dim, float* sums);

// counts[id] += 1 for each of `num_ids` ids; -1 is no expert. Throws std::invalid_argument, having counted nothing, for
// an id outside [-1, num_experts).
void count_experts(const int32_t* ids, int64_t num_ids, int64_t num_experts, int64_t* counts);

struct RouteArgs {
  const float* x;       // [num_tokens][router.cols()]
  int64_t num_tokens;
  const float* bias;    // [num_experts], added for the choice only; null: none
  bool sigmoid;         // else softmax
  int64_t num_groups, topk_groups, k;
  bool normalise;
  float scaling;
  int32_t* topk_ids;    // [num_tokens][k]
  float* topk_weights;  // [num_tokens][k]
};
// Experts of each token, sorted by descending score (ties: lower id first). router: [1][num_experts][hidden].
// Scores that are NaN come last; the ids are in range whatever x holds.
// Throws std::invalid_argument if the counts do not fit together.
void route(ThreadPool& pool, const PackedMatrix& router, const RouteArgs& args);

}  // namespace hybrid
