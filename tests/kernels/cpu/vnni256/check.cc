// The rows of avxvnni, built over vnni256_avx2.h, against the scalar ones: equal bits of products with few tokens and
// with many, of expanded weights and of rounded activations. Prints how many rows it compared.
#include <random>

#include "kernel_inputs.h"

using namespace hybrid;

namespace {

constexpr int kTokens = 11, kGroups = 3;

void compare(const KernelRow& row, const KernelRow& scalar, int64_t cols, std::mt19937& random) {
  const int64_t bytes = cols / row.format->block_cols * group_block_bytes(*row.format);
  std::vector<uint8_t> weights(kGroups * bytes);
  for (uint8_t& byte : weights) byte = static_cast<uint8_t>(random());
  std::normal_distribution<float> normal;
  std::vector<float> x(kTokens * cols);
  for (float& value : x) value = normal(random);
  const Rounded rounded(kKernelsAvxVnni.quantize_row, x, cols), expected(kKernelsScalar.quantize_row, x, cols);
  expect_equal(row.name, "rounded activations", rounded.q8, expected.q8);
  expect_equal(row.name, "sums", rounded.sum16, expected.sum16);
  expect_equal(row.name, "scales", rounded.scale, expected.scale);
  Activations a = rounded.activations();
  a.f32 = x.data(), a.f32_stride = cols;
  std::vector<float> out(kTokens * kGroups * 16), reference(out.size());
  for (int g = 0; g < kGroups; ++g)
    scalar.dot(weights.data() + g * bytes, cols, a, nullptr, kTokens, reference.data() + 16 * g, 16 * kGroups);
  for (const int tokens : {1, 3, kTokens}) {
    for (int g = 0; g < kGroups; ++g)
      row.dot(weights.data() + g * bytes, cols, a, nullptr, tokens, out.data() + 16 * g, 16 * kGroups);
    const std::vector<float> taken(out.begin(), out.begin() + tokens * kGroups * 16);
    expect_equal(row.name, "products", taken, {reference.begin(), reference.begin() + tokens * kGroups * 16});
  }
  if (row.gemm) {
    const Tile tile(rounded, kTokens);
    row.gemm(weights.data(), kGroups, cols, tile.tile, out.data(), 16 * kGroups);
    expect_equal(row.name, "products of a tile", out, reference);
  }
  const int64_t n = std::min<int64_t>(cols, 256) / row.format->block_cols * row.format->block_cols;
  std::vector<float> expanded(16 * n), plain(16 * n);
  row.expand(weights.data(), cols, 0, n, expanded.data(), n);
  scalar.expand(weights.data(), cols, 0, n, plain.data(), n);
  expect_equal(row.name, "weights", expanded, plain);
}

}  // namespace

int main() {
  std::mt19937 random(1);
  for (int i = 0; i < kKernelsAvxVnni.num_rows; ++i) {
    const KernelRow &row = kKernelsAvxVnni.rows[i], &scalar = kKernelsScalar.rows[i];
    for (const int blocks : {1, 2, 5}) compare(row, scalar, blocks * std::max(row.format->block_cols, 32), random);
  }
  std::printf("%d\n", kKernelsAvxVnni.num_rows);
}
