// The rows of amx, built over emulated_tiles.h, against products of the scalar rows: equal bits for every number of
// tokens around the tiles' edges, of groups and of blocks. Prints how many rows it compared.
#include <cmath>
#include <random>

#include "kernel_inputs.h"

using namespace hybrid;

namespace {

constexpr int kMostTokens = 128, kGroups = 3, kStride = 16 * kGroups + 4;

void compare(const KernelRow& row, const KernelRow& scalar, int64_t cols, std::mt19937& random) {
  const int64_t bytes = cols / row.format->block_cols * group_block_bytes(*row.format);
  std::vector<uint8_t> weights(kGroups * bytes);
  for (uint8_t& byte : weights) byte = static_cast<uint8_t>(random());
  std::normal_distribution<float> normal;
  std::vector<float> x(kMostTokens * cols);
  for (float& value : x) value = normal(random);
  x[6 * cols] = std::numeric_limits<float>::infinity();  // its scale is NaN
  for (int64_t i = 0; i < cols; ++i) x[7 * cols + i] = i % 2 == 0 ? 1.0f : -1.0f, x[8 * cols + i] = -1.0f;  // the largest codes
  const Rounded rounded(kKernelsScalar.quantize_row, x, cols);
  std::vector<float> reference(kMostTokens * kStride);
  for (int g = 0; g < kGroups; ++g)
    scalar.dot(weights.data() + g * bytes, cols, rounded.activations(), nullptr, kMostTokens, reference.data() + 16 * g, kStride);
  for (const int tokens : {1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 47, 48, 49, 66, 127, 128}) {
    const Tile tile(rounded, tokens);
    for (const int groups : {1, 2, 3}) {
      if (groups < 3 && tokens > 33) continue;
      std::vector<float> out(kMostTokens * kStride, 7.0f), wanted(out);
      for (int t = 0; t < tokens; ++t)
        std::copy_n(reference.begin() + t * kStride, 16 * groups, wanted.begin() + t * kStride);
      row.gemm(weights.data(), groups, cols, tile.tile, out.data(), kStride);
      expect_equal(row.name, ("products of " + std::to_string(tokens) + " tokens, " + std::to_string(groups) + " groups, " +
                              std::to_string(cols) + " columns").c_str(), out, wanted);
    }
  }
}

}  // namespace

int main() {
  std::mt19937 random(1);
  for (int i = 0; i < kKernelsAmx.num_rows; ++i) {
    const KernelRow& row = kKernelsAmx.rows[i];
    const KernelRow* scalar = nullptr;
    for (int k = 0; k < kKernelsScalar.num_rows; ++k)
      if (kKernelsScalar.rows[k].format == row.format) scalar = &kKernelsScalar.rows[k];
    if (scalar == nullptr) return 1;
    for (const int blocks : {1, 2, 3}) compare(row, *scalar, blocks * row.format->block_cols, random);
    if (row.format->block_cols == 32)
      for (const int cols : {128, 160, 224, 256, 288, 704}) compare(row, *scalar, cols, random);
  }
  std::printf("%d\n", kKernelsAmx.num_rows);
}
