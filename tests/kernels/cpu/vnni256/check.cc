// The rows of avxvnni, built over vnni256_avx2.h, against the scalar ones: equal bits of products with few tokens and
// with many, of expanded weights and of rounded activations. Prints how many rows it compared.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "dispatch.h"

using namespace hybrid;

namespace {

constexpr int kTokens = 11, kGroups = 3;

template <class T>
void expect_equal(const char* name, const char* what, const std::vector<T>& a, const std::vector<T>& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    if (std::memcmp(&a[i], &b[i], sizeof(T)) == 0 || (a[i] != a[i] && b[i] != b[i])) continue;
    std::printf("%s: %s differ at %zu\n", name, what, i);
    std::exit(1);
  }
}

struct Rounded {
  std::vector<int8_t> q8;
  std::vector<float> scale;
  std::vector<int16_t> sum16;
  int64_t stride, blocks;

  Rounded(QuantizeRow quantize, const std::vector<float>& x, int64_t cols)
      : stride((cols + 63) / 64 * 64), blocks((cols + 255) / 256) {
    q8.resize(kTokens * stride);
    scale.resize(kTokens * blocks);
    sum16.resize(kTokens * stride / 16);
    for (int t = 0; t < kTokens; ++t)
      quantize(x.data() + t * cols, cols, q8.data() + t * stride, scale.data() + t * blocks, sum16.data() + t * stride / 16);
  }
};

// The planes of a TokenTile (kernel_abi.h).
struct Tile {
  std::vector<int8_t> q8;
  std::vector<float> scale;
  std::vector<int16_t> sum16;
  TokenTile tile;

  explicit Tile(const Rounded& r) {
    const int64_t padded = (kTokens + kTileStep - 1) / kTileStep * kTileStep;
    q8.resize(r.blocks * padded * 256);
    scale.resize(r.blocks * padded);
    sum16.resize(r.blocks * padded * 16);
    for (int64_t b = 0; b < r.blocks; ++b) {
      for (int64_t t = 0; t < kTokens; ++t) {
        const int64_t row = b * padded + t, cols = std::min<int64_t>(256, r.stride - 256 * b);
        std::memcpy(q8.data() + row * 256, r.q8.data() + t * r.stride + 256 * b, cols);
        std::memcpy(sum16.data() + row * 16, r.sum16.data() + t * r.stride / 16 + 16 * b, cols / 16 * 2);
        scale[row] = r.scale[t * r.blocks + b];
      }
    }
    tile = {kTokens, padded, q8.data(), scale.data(), sum16.data()};
  }
};

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
  Activations a;
  a.f32 = x.data(), a.f32_stride = cols;
  a.q8 = rounded.q8.data(), a.q8_stride = rounded.stride;
  a.scale = rounded.scale.data(), a.scale_stride = rounded.blocks;
  a.sum16 = rounded.sum16.data(), a.sum_stride = rounded.stride / 16;
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
    const Tile tile(rounded);
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
