#include "linear.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "token_tile.h"

namespace hybrid {
namespace {

int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Tokens a unit of work takes: their rows stay in the second-level cache while the unit's weights
// stream past. A multiple of every kernel's token tile.
int64_t token_block(int64_t num_tokens, int64_t row_bytes) {
  constexpr int64_t kCacheBytes = 256 << 10;
  const int64_t fit = kCacheBytes / std::max<int64_t>(row_bytes, 1) / 16 * 16;
  return std::min(num_tokens, std::clamp<int64_t>(fit, 16, kMostTileTokens));
}

// Groups a unit takes: enough bytes to be worth an atomic, and with many tokens the gathering of their tile;
// few enough that no thread waits long.
int64_t group_block(int64_t num_groups, int64_t group_bytes, int num_threads, bool tiled) {
  const int64_t unit_bytes = (tiled ? 512 : 64) << 10;
  const int64_t worthwhile = (unit_bytes + group_bytes - 1) / group_bytes;
  const int64_t balanced = std::max<int64_t>(1, num_groups / (4 * num_threads));
  return std::max<int64_t>(1, std::min(worthwhile, balanced));
}

void check(const char* operation, bool good, const std::string& message) {
  if (!good) throw std::invalid_argument(std::string(operation) + ": " + message);
}

int64_t blocks_of(int64_t num_groups, int64_t groups) { return (num_groups + groups - 1) / groups; }

int rows_in_group(const PackedMatrix& m, int64_t group) {
  return static_cast<int>(std::min<int64_t>(kGroupRows, m.rows() - group * kGroupRows));
}

// Rounds the rows of every token and head, heads of a token together.
void quantize_rows(ThreadPool& pool, const PackedMatrix& m, const LinearArgs& a, const QuantizedRows& rows) {
  const int64_t num_rows = a.num_tokens * m.batch();
  auto quantize = [&](int64_t row, int) {
    rows.quantize(row, a.x + row / m.batch() * a.x_token_stride + row % m.batch() * a.x_batch_stride);
  };
  // A few rows take less time than waking the workers does.
  constexpr int64_t kWorthWaking = 1 << 14;
  if (num_rows * m.cols() < kWorthWaking) {
    for (int64_t row = 0; row < num_rows; ++row) quantize(row, 0);
  } else {
    pool.parallel_for(num_rows, quantize);
  }
}

}  // namespace

void check_product(const char* operation, const PackedMatrix& m, int64_t in, int64_t out, const LinearArgs& a) {
  check(operation, m.division() != Division::kCols, "a matrix divided by columns is for `moe` and `mlp` alone");
  check(operation, a.num_tokens >= 0, "the number of tokens must not be negative, found " + std::to_string(a.num_tokens));
  check(operation, a.num_tokens <= INT32_MAX, "the number of tokens must fit 32 bits, found " + std::to_string(a.num_tokens));
  check(operation, a.x, "the address of x is null");
  check(operation, a.out, "the address of out is null");
  check(operation, a.num_tokens < 2 || a.x_token_stride >= in,
        "the token stride of x must be at least " + std::to_string(in) + ", found " + std::to_string(a.x_token_stride));
  check(operation, a.num_tokens < 2 || a.out_token_stride >= out,
        "the token stride of out must be at least " + std::to_string(out) + ", found " + std::to_string(a.out_token_stride));
  check(operation, m.batch() < 2 || (a.x_batch_stride >= 0 && a.out_batch_stride >= out),
        "the batch stride of out must be at least " + std::to_string(out) + " and that of x not negative, found " +
            std::to_string(a.out_batch_stride) + " and " + std::to_string(a.x_batch_stride));
}

namespace {

// Groups [group, end) of matrix `b` times the tokens of a tile; nothing past the matrix's rows is written.
void run_groups(const KernelRow& kernel, const PackedMatrix& m, int64_t b, int64_t group, int64_t end, int reader,
                const TokenTile& x, float* out, int64_t out_stride) {
  const int64_t whole = std::min(end, m.rows() / kGroupRows);
  if (whole > group) kernel.gemm(m.group(b, group, reader), whole - group, m.cols(), x, out + group * kGroupRows, out_stride);
  if (whole == end) return;
  alignas(64) float tile[kMostTileTokens * kGroupRows];
  kernel.gemm(m.group(b, whole, reader), 1, m.cols(), x, tile, kGroupRows);
  const size_t bytes = static_cast<size_t>(rows_in_group(m, whole)) * sizeof(float);
  for (int64_t t = 0; t < x.num_tokens; ++t)
    std::memcpy(out + t * out_stride + whole * kGroupRows, tile + t * kGroupRows, bytes);
}

}  // namespace

const KernelRow& kernel_for(const PackedMatrix& matrix) {
  const KernelRow* row = select_kernel(matrix.format(), current_isa());
  if (!row) {
    throw std::invalid_argument(std::string("no ") + isa_name(current_isa()) + " kernel reads " +
                                matrix.format().name + "; select_isa(\"scalar\") has one for every format");
  }
  return *row;
}

QuantizedRows::QuantizedRows(Scratch& scratch, int64_t num_rows, int64_t cols)
    : quantize_row_(kernels_of(current_isa()).quantize_row),
      cols_(cols),
      q8_stride_(round_up(cols, 64)),
      scale_stride_((cols + kActBlock - 1) / kActBlock),
      sum_stride_(q8_stride_ / 16),
      q8_(scratch.take<int8_t>(num_rows * q8_stride_)),
      scale_(scratch.take<float>(num_rows * scale_stride_)),
      sum16_(scratch.take<int16_t>(num_rows * sum_stride_)) {}

void QuantizedRows::quantize(int64_t row, const float* x) const { quantize_columns(row, 0, cols_, x); }

Activations QuantizedRows::rows(int64_t start, int64_t step) const {
  Activations a;
  a.q8 = q8_ + start * q8_stride_;
  a.q8_stride = step * q8_stride_;
  a.scale = scale_ + start * scale_stride_;
  a.scale_stride = step * scale_stride_;
  a.sum16 = sum16_ + start * sum_stride_;
  a.sum_stride = step * sum_stride_;
  return a;
}

void run_group(const KernelRow& kernel, const uint8_t* group, int num_rows, int64_t cols, const Activations& x,
               const int32_t* token_ids, int32_t num_tokens, float* out, int64_t out_stride) {
  if (num_rows == kGroupRows) {
    kernel.dot(group, cols, x, token_ids, num_tokens, out, out_stride);
    return;
  }
  constexpr int32_t kTileTokens = 32;
  float tile[kTileTokens * kGroupRows];
  int32_t identity[kTileTokens];
  for (int32_t t = 0; t < num_tokens; t += kTileTokens) {
    const int32_t count = std::min(kTileTokens, num_tokens - t);
    if (!token_ids)
      for (int32_t i = 0; i < count; ++i) identity[i] = t + i;
    kernel.dot(group, cols, x, token_ids ? token_ids + t : identity, count, tile, kGroupRows);
    for (int32_t i = 0; i < count; ++i)
      std::memcpy(out + (t + i) * out_stride, tile + i * kGroupRows, static_cast<size_t>(num_rows) * sizeof(float));
  }
}

void linear_batched(ThreadPool& pool, const PackedMatrix& m, const LinearArgs& a) {
  check_product(m.batch() == 1 ? "linear" : "linear_batched", m, m.cols(), m.rows(), a);
  if (a.num_tokens == 0) return;
  const KernelRow& kernel = kernel_for(m);
  const bool quantised = kernel.activation == ActFormat::q8;
  Scratch& scratch = Scratch::fresh();
  const QuantizedRows rows(scratch, quantised ? a.num_tokens * m.batch() : 0, m.cols());
  if (quantised) quantize_rows(pool, m, a, rows);

  const int64_t tokens = token_block(a.num_tokens, m.cols() * (quantised ? 1 : 4));
  const int64_t token_blocks = (a.num_tokens + tokens - 1) / tokens;
  const bool tiled = kernel.gemm != nullptr && tokens >= kTileWorthwhile;
  const TokenTiles tiles(scratch, tiled ? pool.num_threads() : 0, tokens, m.cols());
  const int64_t groups = group_block(m.num_groups() * m.batch(), m.group_bytes(), pool.num_threads(), tiled);
  // One range of units for each slice of a divided matrix.
  const size_t slices = m.division() == Division::kCopies ? 1 : m.parts().size();
  UnitRanges units;
  for (size_t i = 0; i < slices; ++i) {
    const PackedMatrix::Part& part = m.parts()[i];
    units.add((part.batch_end - part.batch_start) * token_blocks * blocks_of(part.num_groups(), groups));
  }
  // Units that follow one another share a token block and stream through the weights.
  auto work = [&](int64_t unit, int worker) {
    int64_t place;
    const PackedMatrix::Part& part = m.parts()[static_cast<size_t>(units.find(unit, place))];
    const int64_t group_blocks = blocks_of(part.num_groups(), groups);
    const int64_t b = part.batch_start + place / (token_blocks * group_blocks);
    const int64_t t0 = place / group_blocks % token_blocks * tokens;
    const int64_t g0 = part.group_start + place % group_blocks * groups;
    const int32_t count = static_cast<int32_t>(std::min(tokens, a.num_tokens - t0));
    const Activations x = quantised ? rows.rows(t0 * m.batch() + b, m.batch())
                                    : float_rows(a.x + t0 * a.x_token_stride + b * a.x_batch_stride, a.x_token_stride);
    float* out = a.out + t0 * a.out_token_stride + b * a.out_batch_stride;
    const int64_t end_group = std::min(g0 + groups, part.group_end);
    const int reader = pool.group_of(worker);
    if (tiled && count >= kTileWorthwhile) {
      run_groups(kernel, m, b, g0, end_group, reader, tiles.gather(worker, x, nullptr, count), out, a.out_token_stride);
      return;
    }
    for (int64_t g = g0; g < end_group; ++g) {
      run_group(kernel, m.group(b, g, reader), rows_in_group(m, g), m.cols(), x, nullptr, count, out + g * kGroupRows,
                a.out_token_stride);
    }
  };
  if (m.division() == Division::kNone) {
    pool.parallel_for(units.total(), work);
  } else {
    pool.parallel_for_divided(m.division() == Division::kCopies ? pool.split(units.total()) : units, work);
  }
}

void linear(ThreadPool& pool, const PackedMatrix& matrix, const float* x, int64_t num_tokens, int64_t x_stride,
            float* out, int64_t out_stride) {
  check("linear", matrix.batch() == 1,
        "the matrix is a stack of " + std::to_string(matrix.batch()) + "; use linear_batched or moe");
  linear_batched(pool, matrix, {x, num_tokens, x_stride, 0, out, out_stride, 0});
}

void gather_rows(ThreadPool& pool, const PackedMatrix& m, const int32_t* ids, int64_t num_tokens, float* out) {
  constexpr const char* kName = "gather_rows";
  check(kName, m.batch() == 1, "the matrix is a stack of " + std::to_string(m.batch()));
  check(kName, num_tokens >= 0, "the number of ids must not be negative, found " + std::to_string(num_tokens));
  check(kName, ids && out, "the address of ids or out is null");
  for (int64_t t = 0; t < num_tokens; ++t) {
    check(kName, ids[t] >= 0 && ids[t] < m.rows(),
          "id " + std::to_string(ids[t]) + " at position " + std::to_string(t) + " is outside the table of " +
              std::to_string(m.rows()) + " rows");
  }
  check(kName, m.division() != Division::kCols, "a matrix divided by columns is for `moe` and `mlp` alone");
  const KernelRow& kernel = kernel_for(m);
  pool.parallel_for(num_tokens, [&](int64_t t, int worker) {
    alignas(64) float tile[kGroupRows * kActBlock];
    const uint8_t* group = m.group(0, ids[t] / kGroupRows, pool.group_of(worker));
    const int lane = ids[t] % kGroupRows;
    for (int64_t col = 0; col < m.cols(); col += kActBlock) {
      const int64_t n = std::min<int64_t>(kActBlock, m.cols() - col);
      kernel.expand(group, m.cols(), col, n, tile, kActBlock);
      std::memcpy(out + t * m.cols() + col, tile + lane * kActBlock, static_cast<size_t>(n) * sizeof(float));
    }
  });
}

}  // namespace hybrid
