#include "pack.h"

#include <cstring>

#include "kernel_abi.h"

namespace hybrid {
namespace {

// file bit 4m + c <-> packed bit 8c + m
uint32_t spread_bits(uint32_t word) {
  uint32_t out = 0;
  for (int c = 0; c < 4; ++c)
    for (int m = 0; m < 8; ++m) out |= ((word >> (4 * m + c)) & 1u) << (8 * c + m);
  return out;
}

uint32_t gather_bits(uint32_t word) {
  uint32_t out = 0;
  for (int c = 0; c < 4; ++c)
    for (int m = 0; m < 8; ++m) out |= ((word >> (8 * c + m)) & 1u) << (4 * m + c);
  return out;
}

template <int kUnit>
void scatter_units(const uint8_t* field, int count, int row, uint8_t* plane) {
  for (int i = 0; i < count; ++i) std::memcpy(plane + (i * kGroupRows + row) * kUnit, field + i * kUnit, kUnit);
}

template <int kUnit>
void collect_units(const uint8_t* plane, int count, int row, uint8_t* field) {
  for (int i = 0; i < count; ++i) std::memcpy(field + i * kUnit, plane + (i * kGroupRows + row) * kUnit, kUnit);
}

void pack_field(const Field& f, const uint8_t* block, int row, uint8_t* plane) {
  const uint8_t* field = block + f.offset;
  if (f.spread_bits) {
    uint32_t word;
    std::memcpy(&word, field, 4);
    word = spread_bits(word);
    std::memcpy(plane + row * 4, &word, 4);
  } else if (f.unit == 4) {
    scatter_units<4>(field, f.count, row, plane);
  } else if (f.unit == 2) {
    scatter_units<2>(field, f.count, row, plane);
  } else {
    scatter_units<1>(field, f.count, row, plane);
  }
}

void unpack_field(const Field& f, const uint8_t* plane, int row, uint8_t* block) {
  uint8_t* field = block + f.offset;
  if (f.spread_bits) {
    uint32_t word;
    std::memcpy(&word, plane + row * 4, 4);
    word = gather_bits(word);
    std::memcpy(field, &word, 4);
  } else if (f.unit == 4) {
    collect_units<4>(plane, f.count, row, field);
  } else if (f.unit == 2) {
    collect_units<2>(plane, f.count, row, field);
  } else {
    collect_units<1>(plane, f.count, row, field);
  }
}

}  // namespace

void pack_group(const FormatInfo& format, const uint8_t* src, int64_t row_stride, int num_rows, int64_t cols, uint8_t* dst) {
  const int64_t num_blocks = cols / format.block_cols;
  if (num_rows < kGroupRows) std::memset(dst, 0, kGroupRows * num_blocks * format.block_bytes);
  for (int64_t b = 0; b < num_blocks; ++b) {
    uint8_t* plane = dst + b * kGroupRows * format.block_bytes;
    for (int i = 0; i < format.num_fields; ++i) {
      const Field& f = format.fields[i];
      for (int row = 0; row < num_rows; ++row)
        pack_field(f, src + row * row_stride + b * format.block_bytes, row, plane);
      plane += kGroupRows * f.unit * f.count;
    }
  }
}

void unpack_group(const FormatInfo& format, const uint8_t* src, int num_rows, int64_t cols, uint8_t* dst, int64_t row_stride) {
  const int64_t num_blocks = cols / format.block_cols;
  for (int64_t b = 0; b < num_blocks; ++b) {
    const uint8_t* plane = src + b * kGroupRows * format.block_bytes;
    for (int i = 0; i < format.num_fields; ++i) {
      const Field& f = format.fields[i];
      for (int row = 0; row < num_rows; ++row)
        unpack_field(f, plane, row, dst + row * row_stride + b * format.block_bytes);
      plane += kGroupRows * f.unit * f.count;
    }
  }
}

}  // namespace hybrid
