// Products of packed weights with float32 activations, and the activation rows the kernels take.
#pragma once
#include <cstdint>

#include "dispatch.h"
#include "kernel_abi.h"
#include "matrix.h"
#include "scratch.h"
#include "thread_pool.h"

namespace hybrid {

// The kernel of a matrix on the ISA chosen. Throws std::invalid_argument if there is none.
const KernelRow& kernel_for(const PackedMatrix& matrix);

// Rows of int8 activations in scratch memory (the planes of `Activations`), to be filled row by row
// from any thread and then read by kernels.
class QuantizedRows {
 public:
  QuantizedRows(Scratch& scratch, int64_t num_rows, int64_t cols);

  // x[cols] -> row `row`, by the routine of the ISA chosen when this object was made.
  void quantize(int64_t row, const float* x) const;

  // x[n] -> columns [col, col + n) of row `row`; col is a multiple of kActBlock, and n too unless it ends the row.
  void quantize_columns(int64_t row, int64_t col, int64_t n, const float* x) const {
    quantize_row_(x, n, q8_ + row * q8_stride_ + col, scale_ + row * scale_stride_ + col / kActBlock,
                  sum16_ + row * sum_stride_ + col / 16);
  }

  // Rows start, start + step, start + 2 * step ...
  Activations rows(int64_t start = 0, int64_t step = 1) const;

 private:
  QuantizeRow quantize_row_;
  int64_t cols_, q8_stride_, scale_stride_, sum_stride_;
  int8_t* q8_;
  float* scale_;
  int16_t* sum16_;
};

// Float rows as a float-format kernel takes them.
inline Activations float_rows(const float* x, int64_t stride) {
  Activations a;
  a.f32 = x;
  a.f32_stride = stride;
  return a;
}

// One group's product for the first `num_rows` of its 16 rows: out[t * out_stride + r]. Groups that
// end a matrix go through a tile, so that nothing past num_rows is written.
void run_group(const KernelRow& kernel, const uint8_t* group, int num_rows, int64_t cols, const Activations& x,
               const int32_t* token_ids, int32_t num_tokens, float* out, int64_t out_stride);

// Strides are in elements. All of these throw std::invalid_argument before anything is written.

// out[t][b][:] = W[b] @ x[t][b][:], for x[t * token_stride + b * batch_stride + column].
struct LinearArgs {
  const float* x;
  int64_t num_tokens, x_token_stride, x_batch_stride;
  float* out;
  int64_t out_token_stride, out_batch_stride;
};
void linear_batched(ThreadPool& pool, const PackedMatrix& matrix, const LinearArgs& args);

// Throws std::invalid_argument, naming the operation, where addresses or strides do not fit rows of `in` elements
// of x and `out` elements of the results.
void check_product(const char* operation, const PackedMatrix& matrix, int64_t in, int64_t out, const LinearArgs& args);

// out[t] = W @ x[t] for a matrix with batch 1.
void linear(ThreadPool& pool, const PackedMatrix& matrix, const float* x, int64_t num_tokens, int64_t x_stride,
            float* out, int64_t out_stride);

// out[t][cols] = row ids[t] of a matrix with batch 1, dequantised.
void gather_rows(ThreadPool& pool, const PackedMatrix& matrix, const int32_t* ids, int64_t num_tokens, float* out);

}  // namespace hybrid
