#include "ops.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "linear.h"
#include "scratch.h"

namespace hybrid {
namespace {

// The best entries seen, sorted by descending score; an equal score keeps the earlier one in front.
class TopK {
 public:
  TopK(int32_t* ids, float* scores, int64_t k) : ids_(ids), scores_(scores), k_(k) {}

  void offer(int32_t id, float score) {
    if (count_ == k_ && !(score > scores_[k_ - 1])) return;
    int64_t at = count_ < k_ ? count_++ : k_ - 1;
    for (; at > 0 && score > scores_[at - 1]; --at) {
      ids_[at] = ids_[at - 1];
      scores_[at] = scores_[at - 1];
    }
    ids_[at] = id;
    scores_[at] = score;
  }

 private:
  int32_t* ids_;
  float* scores_;
  int64_t k_, count_ = 0;
};

struct Routing {
  const RouteArgs& args;
  const OpsTable& ops;
  int64_t num_experts;
  const float* logits;  // [num_tokens][num_experts]
};

// Scratch of one worker.
struct RouteSpace {
  float *scores, *choice, *best_scores;
  int32_t* groups;
};

float or_lowest(float score) { return std::isnan(score) ? -std::numeric_limits<float>::infinity() : score; }

// DeepSeek-V2 scores a group by its best expert, V3 by the sum of its two best.
float group_score(const float* choice, int64_t size, bool two_best) {
  float first = choice[0], second = -std::numeric_limits<float>::infinity();
  for (int64_t i = 1; i < size; ++i) {
    second = std::max(second, std::min(first, choice[i]));
    first = std::max(first, choice[i]);
  }
  return two_best && size > 1 ? first + second : first;
}

void choose_experts(const Routing& routing, const RouteSpace& space, int32_t* ids) {
  const RouteArgs& args = routing.args;
  const int64_t size = routing.num_experts / args.num_groups;
  TopK best(ids, space.best_scores, args.k);
  if (args.topk_groups == args.num_groups) {
    for (int64_t e = 0; e < routing.num_experts; ++e) best.offer(static_cast<int32_t>(e), space.choice[e]);
    return;
  }
  TopK groups(space.groups, space.best_scores, args.topk_groups);
  for (int64_t g = 0; g < args.num_groups; ++g) {
    groups.offer(static_cast<int32_t>(g), or_lowest(group_score(space.choice + g * size, size, args.sigmoid)));
  }
  std::sort(space.groups, space.groups + args.topk_groups);
  for (int64_t g = 0; g < args.topk_groups; ++g) {
    for (int64_t e = space.groups[g] * size; e < (space.groups[g] + 1) * size; ++e) {
      best.offer(static_cast<int32_t>(e), space.choice[e]);
    }
  }
}

void route_token(const Routing& routing, const RouteSpace& space, int64_t token) {
  const RouteArgs& args = routing.args;
  const float* logits = routing.logits + token * routing.num_experts;
  (args.sigmoid ? routing.ops.sigmoid : routing.ops.softmax)(logits, routing.num_experts, space.scores);
  for (int64_t e = 0; e < routing.num_experts; ++e) {
    space.choice[e] = or_lowest(args.bias == nullptr ? space.scores[e] : space.scores[e] + args.bias[e]);
  }
  int32_t* ids = args.topk_ids + token * args.k;
  float* weights = args.topk_weights + token * args.k;
  choose_experts(routing, space, ids);
  float sum = 0.0f;
  for (int64_t i = 0; i < args.k; ++i) sum += space.scores[ids[i]];
  const float denominator = args.normalise ? sum + 1e-20f : 1.0f;
  for (int64_t i = 0; i < args.k; ++i) weights[i] = space.scores[ids[i]] / denominator * args.scaling;
}

void check_route(const RouteArgs& args, int64_t num_experts) {
  const bool groups_fit = args.num_groups >= 1 && num_experts % args.num_groups == 0 &&
                          args.topk_groups >= 1 && args.topk_groups <= args.num_groups;
  if (!groups_fit) {
    throw std::invalid_argument("route: " + std::to_string(args.topk_groups) + " of " +
                                std::to_string(args.num_groups) + " groups cannot be chosen from " +
                                std::to_string(num_experts) +
                                " experts; groups must be of equal size and at least one chosen");
  }
  const int64_t eligible = num_experts / args.num_groups * args.topk_groups;
  if (args.k < 1 || args.k > eligible) {
    throw std::invalid_argument("route: num_experts_per_tok is " + std::to_string(args.k) + "; it must be between 1 and " +
                                std::to_string(eligible) + ", the experts in the chosen groups");
  }
}

}  // namespace

const OpsTable& ops_table(Isa isa) {
  switch (isa) {
    case Isa::kAmx:
    case Isa::kAvx512Vbmi:
    case Isa::kAvx512Vnni:
      return kOpsAvx512Vnni;
    case Isa::kAvxVnni:
    case Isa::kAvx2:
      return kOpsAvx2;
    case Isa::kScalar:
      return kOpsScalar;
  }
  throw std::logic_error("ops_table: no such ISA");
}

void rms_norm(ThreadPool& pool, const float* x, int64_t num_tokens, int64_t dim, const float* weight, float eps,
              float* residual, float* out) {
  const OpsTable& ops = ops_table(current_isa());
  for_each_token(pool, num_tokens, dim, [&](int64_t t, int) {
    ops.rms_norm(x + t * dim, weight, residual == nullptr ? nullptr : residual + t * dim, eps, dim, out + t * dim);
  });
}

void add(ThreadPool& pool, const float* x, int64_t num_tokens, int64_t dim, float* sums) {
  const OpsTable& ops = ops_table(current_isa());
  const float one = 1.0f;
  for_each_token(pool, num_tokens, dim, [&](int64_t t, int) { ops.accumulate(x + t * dim, dim, &one, 1, dim, sums + t * dim); });
}

void count_experts(const int32_t* ids, int64_t num_ids, int64_t num_experts, int64_t* counts) {
  for (int64_t i = 0; i < num_ids; ++i) {
    if (ids[i] < -1 || ids[i] >= num_experts) {
      throw std::invalid_argument("count_experts: id " + std::to_string(ids[i]) + " at position " + std::to_string(i) +
                                  " is none of " + std::to_string(num_experts) + " experts");
    }
  }
  for (int64_t i = 0; i < num_ids; ++i) {
    if (ids[i] >= 0) ++counts[ids[i]];
  }
}

void route(ThreadPool& pool, const PackedMatrix& router, const RouteArgs& args) {
  const int64_t num_experts = router.rows();
  check_route(args, num_experts);
  Scratch& scratch = Scratch::fresh(1);
  float* logits = scratch.take<float>(args.num_tokens * num_experts);
  linear(pool, router, args.x, args.num_tokens, router.cols(), logits, num_experts);
  RouteSpace* spaces = scratch.take<RouteSpace>(pool.num_threads());
  for (int i = 0; i < pool.num_threads(); ++i) {
    spaces[i] = {scratch.take<float>(num_experts), scratch.take<float>(num_experts), scratch.take<float>(num_experts),
                 scratch.take<int32_t>(num_experts)};
  }
  const Routing routing{args, ops_table(current_isa()), num_experts, logits};
  for_each_token(pool, args.num_tokens, num_experts * 8,
                 [&](int64_t t, int worker) { route_token(routing, spaces[worker], t); });
}

}  // namespace hybrid
