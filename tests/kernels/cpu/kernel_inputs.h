// Inputs of kernels for the checks in C++: rounded activations, and tiles of them.
#pragma once
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "dispatch.h"

namespace hybrid {

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
    const int64_t tokens = static_cast<int64_t>(x.size()) / cols;
    q8.resize(tokens * stride);
    scale.resize(tokens * blocks);
    sum16.resize(tokens * stride / 16);
    for (int64_t t = 0; t < tokens; ++t)
      quantize(x.data() + t * cols, cols, q8.data() + t * stride, scale.data() + t * blocks, sum16.data() + t * stride / 16);
  }

  Activations activations() const {
    Activations a;
    a.q8 = q8.data(), a.q8_stride = stride;
    a.scale = scale.data(), a.scale_stride = blocks;
    a.sum16 = sum16.data(), a.sum_stride = stride / 16;
    return a;
  }
};

// The planes of a TokenTile (kernel_abi.h) for the first tokens.
struct Tile {
  std::vector<int8_t> q8;
  std::vector<float> scale;
  std::vector<int16_t> sum16;
  TokenTile tile;

  Tile(const Rounded& r, int64_t tokens) {
    const int64_t padded = (tokens + kTileStep - 1) / kTileStep * kTileStep;
    q8.resize(r.blocks * padded * 256);
    scale.resize(r.blocks * padded);
    sum16.resize(r.blocks * padded * 16);
    for (int64_t b = 0; b < r.blocks; ++b) {
      for (int64_t t = 0; t < tokens; ++t) {
        const int64_t row = b * padded + t, cols = std::min<int64_t>(256, r.stride - 256 * b);
        std::memcpy(q8.data() + row * 256, r.q8.data() + t * r.stride + 256 * b, cols);
        std::memcpy(sum16.data() + row * 16, r.sum16.data() + t * r.stride / 16 + 16 * b, cols / 16 * 2);
        scale[row] = r.scale[t * r.blocks + b];
      }
    }
    tile = {tokens, padded, q8.data(), scale.data(), sum16.data()};
  }
};

}  // namespace hybrid
