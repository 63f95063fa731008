// Products with transposed quantised matrices, as absorbing the key half of attn_kv_b needs.
#pragma once
#include <cstdint>

#include "matrix.h"
#include "thread_pool.h"

namespace hybrid {

// out[t, b, c] = sum over rows j of x[t, b, j] * W[b][j, c], float32 on dequantised weights, j
// ascending, one fused multiply-add each. Strides in elements; `out` must not overlap `x`.
// Throws std::invalid_argument where strides are shorter than rows.
void linear_transposed_batched(ThreadPool& pool, const PackedMatrix& matrix, const float* x, int64_t num_tokens,
                               int64_t x_token_stride, int64_t x_batch_stride, float* out, int64_t out_token_stride,
                               int64_t out_batch_stride);

}  // namespace hybrid
