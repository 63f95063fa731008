// Python entry points of the operations. Tensors come as addresses; shapes are stated by the caller.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <bitset>
#include <chrono>
#include <stdexcept>
#include <string>

#include "absorb.h"
#include "attention.h"
#include "bindings_address.h"
#include "bindings_ops.h"
#include "gqa_attention.h"
#include "machine_limits.h"
#include "moe.h"
#include "ops.h"
#include "recording.h"
#include "scratch.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace hybrid {
namespace {

void check_count(int64_t n, int64_t least, const char* operation, const char* argument) {
  if (n < least) {
    throw std::invalid_argument(std::string(operation) + ": `" + argument + "` must be at least " +
                                std::to_string(least) + ", found " + std::to_string(n));
  }
}

CacheFormat cache_format(const std::string& name) {
  if (name == "f32") return CacheFormat::kF32;
  if (name == "f16") return CacheFormat::kF16;
  if (name == "bf16") return CacheFormat::kBF16;
  if (name == "q8_0") return CacheFormat::kQ8_0;
  throw std::invalid_argument("cache format '" + name + "' is unknown; choose f32, f16, bf16 or q8_0");
}

void bind_norm(ThreadPool& pool, Address x, int64_t num_tokens, int64_t dim, Address weight, float eps,
               Address residual, Address out) {
  constexpr const char* kName = "rms_norm";
  check_count(num_tokens, 0, kName, "num_tokens");
  check_count(dim, 1, kName, "dim");
  if (num_tokens == 0) return;
  run_operation([&pool, num_tokens, dim, eps, x_in = pointer<const float>(x, kName, "x"),
                 scale = pointer<const float>(weight, kName, "weight"), add_to = optional_pointer<float>(residual, kName, "residual"),
                 result = pointer<float>(out, kName, "out")] {
    rms_norm(pool, x_in, num_tokens, dim, scale, eps, add_to, result);
  });
}

void bind_append(ThreadPool& pool, Address q, int64_t num_tokens, int64_t num_heads, int64_t head_dim, Address kv,
                 Address kv_norm, float eps, Address rope, int64_t max_positions, Address cache,
                 const std::string& format, int64_t num_blocks, int64_t latent_dim, int64_t rope_dim,
                 Address positions, Address slot_mapping) {
  constexpr const char* kName = "mla_append";
  check_count(num_tokens, 0, kName, "num_tokens");
  check_count(num_heads, 1, kName, "num_heads");
  if (num_tokens == 0) return;
  const MlaAppendArgs args{.q = pointer<float>(q, kName, "q"),
                           .num_tokens = num_tokens,
                           .num_heads = num_heads,
                           .head_dim = head_dim,
                           .kv = pointer<const float>(kv, kName, "kv"),
                           .kv_norm = pointer<const float>(kv_norm, kName, "kv_norm"),
                           .eps = eps,
                           .rope = pointer<const float>(rope, kName, "rope"),
                           .max_positions = max_positions,
                           .cache = {{pointer<void>(cache, kName, "cache"), cache_format(format), num_blocks, latent_dim + rope_dim},
                                     latent_dim,
                                     rope_dim},
                           .positions = pointer<const int32_t>(positions, kName, "positions"),
                           .slot_mapping = pointer<const int32_t>(slot_mapping, kName, "slot_mapping")};
  run_operation([&pool, args] { mla_append(pool, args); });
}

void bind_attention(ThreadPool& pool, Address q, Address q_latent, int64_t num_tokens, int64_t num_heads,
                    int64_t head_dim, Address cache, const std::string& format, int64_t num_blocks,
                    int64_t latent_dim, int64_t rope_dim, int64_t num_sequences, Address positions,
                    Address query_start, Address seq_lens, Address block_tables, int64_t block_table_stride,
                    float scale, Address out) {
  constexpr const char* kName = "mla_attention";
  check_count(num_tokens, 0, kName, "num_tokens");
  check_count(num_heads, 1, kName, "num_heads");
  check_count(num_sequences, 0, kName, "num_sequences");
  if (num_tokens == 0) return;
  const MlaAttentionArgs args{.q = pointer<const float>(q, kName, "q"),
                              .q_latent = pointer<const float>(q_latent, kName, "q_latent"),
                              .rows = {.num_tokens = num_tokens,
                                       .num_heads = num_heads,
                                       .num_sequences = num_sequences,
                                       .positions = pointer<const int32_t>(positions, kName, "positions"),
                                       .query_start = pointer<const int32_t>(query_start, kName, "query_start"),
                                       .seq_lens = pointer<const int32_t>(seq_lens, kName, "seq_lens"),
                                       .block_tables = pointer<const int32_t>(block_tables, kName, "block_tables"),
                                       .block_table_stride = block_table_stride},
                              .head_dim = head_dim,
                              .cache = {{pointer<void>(cache, kName, "cache"), cache_format(format), num_blocks, latent_dim + rope_dim},
                                     latent_dim,
                                     rope_dim},
                              .scale = scale,
                              .out = pointer<float>(out, kName, "out")};
  run_operation([&pool, args] { mla_attention(pool, args); });
}

void bind_gqa_append(ThreadPool& pool, Address q, int64_t num_tokens, int64_t num_heads, int64_t num_kv_heads,
                     int64_t head_dim, Address k, Address v, Address rope, int64_t rope_dim, int64_t max_positions,
                     bool halves, Address keys, Address values, const std::string& format, int64_t num_blocks,
                     Address positions, Address slot_mapping) {
  constexpr const char* kName = "gqa_append";
  check_count(num_tokens, 0, kName, "num_tokens");
  if (num_tokens == 0) return;
  const CacheFormat kind = cache_format(format);
  const int64_t width = num_kv_heads * head_dim;
  const GqaAppendArgs args{.q = pointer<float>(q, kName, "q"),
                           .num_tokens = num_tokens,
                           .num_heads = num_heads,
                           .num_kv_heads = num_kv_heads,
                           .head_dim = head_dim,
                           .k = pointer<const float>(k, kName, "k"),
                           .v = pointer<const float>(v, kName, "v"),
                           .rope = pointer<const float>(rope, kName, "rope"),
                           .rope_dim = rope_dim,
                           .max_positions = max_positions,
                           .halves = halves,
                           .keys = {pointer<void>(keys, kName, "keys"), kind, num_blocks, width},
                           .values = {pointer<void>(values, kName, "values"), kind, num_blocks, width},
                           .positions = pointer<const int32_t>(positions, kName, "positions"),
                           .slot_mapping = pointer<const int32_t>(slot_mapping, kName, "slot_mapping")};
  run_operation([&pool, args] { gqa_append(pool, args); });
}

void bind_gqa_attention(ThreadPool& pool, Address q, int64_t num_tokens, int64_t num_heads, int64_t num_kv_heads,
                        int64_t head_dim, Address keys, Address values, const std::string& format, int64_t num_blocks,
                        int64_t num_sequences, Address positions, Address query_start, Address seq_lens,
                        Address block_tables, int64_t block_table_stride, float scale, Address out) {
  constexpr const char* kName = "gqa_attention";
  check_count(num_tokens, 0, kName, "num_tokens");
  check_count(num_sequences, 0, kName, "num_sequences");
  if (num_tokens == 0) return;
  const CacheFormat kind = cache_format(format);
  const int64_t width = num_kv_heads * head_dim;
  const GqaAttentionArgs args{.q = pointer<const float>(q, kName, "q"),
                              .rows = {.num_tokens = num_tokens,
                                       .num_heads = num_heads,
                                       .num_sequences = num_sequences,
                                       .positions = pointer<const int32_t>(positions, kName, "positions"),
                                       .query_start = pointer<const int32_t>(query_start, kName, "query_start"),
                                       .seq_lens = pointer<const int32_t>(seq_lens, kName, "seq_lens"),
                                       .block_tables = pointer<const int32_t>(block_tables, kName, "block_tables"),
                                       .block_table_stride = block_table_stride},
                              .num_kv_heads = num_kv_heads,
                              .head_dim = head_dim,
                              .keys = {pointer<void>(keys, kName, "keys"), kind, num_blocks, width},
                              .values = {pointer<void>(values, kName, "values"), kind, num_blocks, width},
                              .scale = scale,
                              .out = pointer<float>(out, kName, "out")};
  run_operation([&pool, args] { gqa_attention(pool, args); });
}

void bind_route(ThreadPool& pool, const PackedMatrix& router, Address x, int64_t num_tokens, Address bias,
                const std::string& scoring, int64_t num_groups, int64_t topk_groups, int64_t k, bool norm_topk_prob,
                float routed_scaling_factor, Address topk_ids, Address topk_weights) {
  constexpr const char* kName = "route";
  check_count(num_tokens, 0, kName, "num_tokens");
  if (scoring != "softmax" && scoring != "sigmoid") {
    throw std::invalid_argument("route: scoring '" + scoring + "' is unknown; choose softmax or sigmoid");
  }
  if (num_tokens == 0) return;
  const RouteArgs args{.x = pointer<const float>(x, kName, "x"),
                       .num_tokens = num_tokens,
                       .bias = optional_pointer<const float>(bias, kName, "bias"),
                       .sigmoid = scoring == "sigmoid",
                       .num_groups = num_groups,
                       .topk_groups = topk_groups,
                       .k = k,
                       .normalise = norm_topk_prob,
                       .scaling = routed_scaling_factor,
                       .topk_ids = pointer<int32_t>(topk_ids, kName, "topk_ids"),
                       .topk_weights = pointer<float>(topk_weights, kName, "topk_weights")};
  run_operation([&pool, &router, args] { route(pool, router, args); });
}

void bind_transposed(ThreadPool& pool, const PackedMatrix& matrix, Address x, int64_t num_tokens,
                     int64_t x_token_stride, int64_t x_batch_stride, Address out, int64_t out_token_stride,
                     int64_t out_batch_stride) {
  constexpr const char* kName = "linear_transposed_batched";
  check_count(num_tokens, 0, kName, "num_tokens");
  if (num_tokens == 0) return;
  run_operation([=, &pool, &matrix, x_in = pointer<const float>(x, kName, "x"), result = pointer<float>(out, kName, "out")] {
    linear_transposed_batched(pool, matrix, x_in, num_tokens, x_token_stride, x_batch_stride, result, out_token_stride,
                              out_batch_stride);
  });
}

// moe, with its time and the experts it reads counted in the pool.
void counted_moe(ThreadPool& pool, const PackedMatrix& gate, const PackedMatrix& up, const PackedMatrix& down,
                 const MoeArgs& args) {
  const auto start = std::chrono::steady_clock::now();
  moe(pool, gate, up, down, args);
  pool.moe_ns += std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - start).count();
  std::bitset<4096> seen;  // ids beyond it are counted as one
  for (int64_t i = 0; i < args.num_tokens * args.k; ++i) {
    if (args.topk_ids[i] >= 0) seen.set(std::min<size_t>(static_cast<size_t>(args.topk_ids[i]), seen.size() - 1));
  }
  pool.moe_experts += static_cast<int64_t>(seen.count());
}

void bind_moe(ThreadPool& pool, const PackedMatrix& gate, const PackedMatrix& up, const PackedMatrix& down, Address x,
              int64_t num_tokens, Address topk_ids, Address topk_weights, int64_t k, Address out) {
  constexpr const char* kName = "moe";
  check_count(num_tokens, 0, kName, "num_tokens");
  check_count(k, 1, kName, "k");
  if (num_tokens == 0) return;
  const MoeArgs args{.x = pointer<const float>(x, kName, "x"),
                     .num_tokens = num_tokens,
                     .topk_ids = pointer<const int32_t>(topk_ids, kName, "topk_ids"),
                     .topk_weights = pointer<const float>(topk_weights, kName, "topk_weights"),
                     .k = k,
                     .out = pointer<float>(out, kName, "out")};
  run_operation([&pool, &gate, &up, &down, args] { counted_moe(pool, gate, up, down, args); });
}

void bind_add(ThreadPool& pool, Address x, int64_t num_tokens, int64_t dim, Address sums) {
  constexpr const char* kName = "add";
  check_count(num_tokens, 0, kName, "num_tokens");
  check_count(dim, 1, kName, "dim");
  if (num_tokens == 0) return;
  run_operation([&pool, num_tokens, dim, x_in = pointer<const float>(x, kName, "x"),
                 add_to = pointer<float>(sums, kName, "sums")] { add(pool, x_in, num_tokens, dim, add_to); });
}

void bind_count(Address ids, int64_t num_ids, int64_t num_experts, Address counts) {
  constexpr const char* kName = "count_experts";
  check_count(num_ids, 0, kName, "num_ids");
  check_count(num_experts, 1, kName, "num_experts");
  if (num_ids == 0) return;
  run_operation([num_ids, num_experts, ids_in = pointer<const int32_t>(ids, kName, "ids"),
                 totals = pointer<int64_t>(counts, kName, "counts")] { count_experts(ids_in, num_ids, num_experts, totals); });
}

void bind_mlp(ThreadPool& pool, const PackedMatrix& gate, const PackedMatrix& up, const PackedMatrix& down, Address x,
              int64_t num_tokens, Address out) {
  constexpr const char* kName = "mlp";
  check_count(num_tokens, 0, kName, "num_tokens");
  if (num_tokens == 0) return;
  run_operation([&pool, &gate, &up, &down, num_tokens, x_in = pointer<const float>(x, kName, "x"),
                 result = pointer<float>(out, kName, "out")] { mlp(pool, gate, up, down, x_in, num_tokens, result); });
}

}  // namespace

void bind_ops(nb::module_& m) {
  m.def("rms_norm", &bind_norm, "pool"_a, "x"_a, "num_tokens"_a, "dim"_a, "weight"_a, "eps"_a, "residual"_a, "out"_a,
        Unlocked(), "RMS normalisation of float32 [num_tokens, dim]; residual (address, 0: none) is added to in place first.");
  m.def("mla_append", &bind_append, "pool"_a, "q"_a, "num_tokens"_a, "num_heads"_a, "head_dim"_a, "kv"_a, "kv_norm"_a,
        "eps"_a, "rope"_a, "max_positions"_a, "cache"_a, "cache_format"_a, "num_blocks"_a, "latent_dim"_a, "rope_dim"_a,
        "positions"_a, "slot_mapping"_a, Unlocked(),
        "Rotates q in place, normalises and rotates kv and stores it in the latent cache (attention.h).");
  m.def("mla_attention", &bind_attention, "pool"_a, "q"_a, "q_latent"_a, "num_tokens"_a, "num_heads"_a, "head_dim"_a,
        "cache"_a, "cache_format"_a, "num_blocks"_a, "latent_dim"_a, "rope_dim"_a, "num_sequences"_a, "positions"_a,
        "query_start"_a, "seq_lens"_a, "block_tables"_a, "block_table_stride"_a, "scale"_a, "out"_a, Unlocked(),
        "Causal attention over the latent cache (attention.h): out is float32 [num_tokens, num_heads, latent_dim].");
  m.def("gqa_append", &bind_gqa_append, "pool"_a, "q"_a, "num_tokens"_a, "num_heads"_a, "num_kv_heads"_a, "head_dim"_a,
        "k"_a, "v"_a, "rope"_a, "rope_dim"_a, "max_positions"_a, "halves"_a, "keys"_a, "values"_a, "cache_format"_a,
        "num_blocks"_a, "positions"_a, "slot_mapping"_a, Unlocked(),
        "Rotates q in place and k on its way, and stores k and v in the cache (gqa_attention.h).");
  m.def("gqa_attention", &bind_gqa_attention, "pool"_a, "q"_a, "num_tokens"_a, "num_heads"_a, "num_kv_heads"_a,
        "head_dim"_a, "keys"_a, "values"_a, "cache_format"_a, "num_blocks"_a, "num_sequences"_a, "positions"_a,
        "query_start"_a, "seq_lens"_a, "block_tables"_a, "block_table_stride"_a, "scale"_a, "out"_a, Unlocked(),
        "Causal attention with grouped heads (gqa_attention.h): out is float32 [num_tokens, num_heads, head_dim].");
  m.def("route", &bind_route, "pool"_a, "router"_a, "x"_a, "num_tokens"_a, "bias"_a, "scoring"_a, "num_groups"_a,
        "topk_groups"_a, "k"_a, "norm_topk_prob"_a, "routed_scaling_factor"_a, "topk_ids"_a, "topk_weights"_a,
        Unlocked(), "Chooses k experts for each token; bias (address, 0: none) takes part in the choice alone.");
  m.def("linear_transposed_batched", &bind_transposed, "pool"_a, "matrix"_a, "x"_a, "num_tokens"_a, "x_token_stride"_a,
        "x_batch_stride"_a, "out"_a, "out_token_stride"_a, "out_batch_stride"_a, Unlocked(),
        "out[t, b, cols] = x[t, b, rows] @ W[b], float32 arithmetic on dequantised weights; strides in elements.");
  m.def("moe", &bind_moe, "pool"_a, "gate"_a, "up"_a, "down"_a, "x"_a, "num_tokens"_a, "topk_ids"_a, "topk_weights"_a,
        "k"_a, "out"_a, Unlocked(), "A whole layer of routed experts; ids of -1 contribute nothing.");
  m.def("mlp", &bind_mlp, "pool"_a, "gate"_a, "up"_a, "down"_a, "x"_a, "num_tokens"_a, "out"_a, Unlocked(),
        "A dense SwiGLU block.");
  m.def("add", &bind_add, "pool"_a, "x"_a, "num_tokens"_a, "dim"_a, "sums"_a, Unlocked(),
        "sums += x, both float32 [num_tokens, dim].");
  m.def("count_experts", &bind_count, "ids"_a, "num_ids"_a, "num_experts"_a, "counts"_a, Unlocked(),
        "counts[id] += 1, int64 [num_experts], for int32 ids; -1 counts nowhere.");
  nb::class_<Recording>(m, "Recording", "Operations kept to run again without Python between them (recording.h).")
      .def(nb::init<>())
      .def("start", &Recording::start, "Keeps the operations this thread calls from now on.")
      .def("stop", &Recording::stop)
      .def("run", &Recording::run, Unlocked(), "Repeats the operations on the memory they were recorded with.")
      .def("__len__", &Recording::size);
  m.def("measure_read_bandwidth", &measure_read_bandwidth, "pool"_a, "bytes"_a, "seconds"_a, "num_threads"_a = 0,
        Unlocked(), "Bytes a second read from RAM, the best of several loops, by num_threads threads (0: all).");
  m.def("measure_int8_rate", &measure_int8_rate, "pool"_a, "seconds"_a, Unlocked(),
        "Operations a second of int8 products from registers by all threads; a product and a sum are two.");
  m.def("scratch_bytes", &Scratch::total_bytes, "Bytes of scratch memory held by the operations, over all threads.");
  m.def("release_scratch", &Scratch::release, "Gives the calling thread's scratch memory back.");
  m.def("fill_scratch", &Scratch::fill, "byte"_a, "Overwrites the calling thread's scratch memory, for tests.");
}

}  // namespace hybrid
