#include "pack.h"

#include <emmintrin.h>

#include <cstring>

#include "kernel_abi.h"
#include "recode.h"

namespace hybrid {
namespace {

// Exchanges bits that are `distance` apart, the lower ones those of `mask`.
uint32_t exchange(uint32_t word, int distance, uint32_t mask) {
  const uint32_t changed = (word ^ (word >> distance)) & mask;
  return word ^ changed ^ (changed << distance);
}

// file bit 4m + c <-> packed bit 8c + m: the place's five binary digits rotated by two, by exchanges of two digits.
uint32_t spread_bits(uint32_t word) {
  word = exchange(word, 3, 0x0a0a0a0au);
  word = exchange(word, 6, 0x00cc00ccu);
  word = exchange(word, 12, 0x0000f0f0u);
  return exchange(word, 8, 0x0000ff00u);
}

uint32_t gather_bits(uint32_t word) {
  word = exchange(word, 8, 0x0000ff00u);
  word = exchange(word, 12, 0x0000f0f0u);
  word = exchange(word, 6, 0x00cc00ccu);
  return exchange(word, 3, 0x0a0a0a0au);
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

// Units of four bytes of 16 rows, `stride` bytes apart: four rows' four units are transposed at once.
void scatter_words(const uint8_t* field, int64_t stride, int count, uint8_t* plane) {
  for (int row = 0; row < kGroupRows; row += 4) {
    const uint8_t* first = field + row * stride;
    int i = 0;
    for (; i + 4 <= count; i += 4) {
      const auto load = [&](int r) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(first + r * stride + i * 4)); };
      const __m128i a = load(0), b = load(1), c = load(2), d = load(3);
      const __m128i ab_low = _mm_unpacklo_epi32(a, b), ab_high = _mm_unpackhi_epi32(a, b);
      const __m128i cd_low = _mm_unpacklo_epi32(c, d), cd_high = _mm_unpackhi_epi32(c, d);
      const auto store = [&](int unit, __m128i words) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(plane + ((i + unit) * kGroupRows + row) * 4), words);
      };
      store(0, _mm_unpacklo_epi64(ab_low, cd_low));
      store(1, _mm_unpackhi_epi64(ab_low, cd_low));
      store(2, _mm_unpacklo_epi64(ab_high, cd_high));
      store(3, _mm_unpackhi_epi64(ab_high, cd_high));
    }
    for (; i < count; ++i)
      for (int r = 0; r < 4; ++r) std::memcpy(plane + (i * kGroupRows + row + r) * 4, first + r * stride + i * 4, 4);
  }
}

// A field of 16 rows, `stride` bytes apart.
void pack_rows_of_field(const Field& f, const uint8_t* field, int64_t stride, uint8_t* plane) {
  if (f.spread_bits) {
    uint32_t words[kGroupRows];
    for (int row = 0; row < kGroupRows; ++row) std::memcpy(&words[row], field + row * stride, 4);
    for (uint32_t& word : words) word = spread_bits(word);
    std::memcpy(plane, words, sizeof words);
  } else if (f.unit == 4) {
    scatter_words(field, stride, f.count, plane);
  } else if (f.unit == 2) {
    for (int row = 0; row < kGroupRows; ++row) scatter_units<2>(field + row * stride, f.count, row, plane);
  } else {
    for (int row = 0; row < kGroupRows; ++row) scatter_units<1>(field + row * stride, f.count, row, plane);
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
  const int packed_bytes = group_block_bytes(format);
  if (num_rows < kGroupRows || format.recoded_bytes) std::memset(dst, 0, static_cast<size_t>(num_blocks * packed_bytes));
  if (format.block_bytes == 4 && num_rows == kGroupRows) {  // blocks of one word: rows are one field
    scatter_words(src, row_stride, static_cast<int>(num_blocks), dst);
    return;
  }
  for (int64_t b = 0; b < num_blocks; ++b) {
    uint8_t* plane = dst + b * packed_bytes;
    for (int row = 0; row < num_rows && format.recoded_bytes; ++row)
      recode_block(format, src + row * row_stride + b * format.block_bytes, row, plane);
    for (int i = 0; i < format.num_fields; ++i) {
      const Field& f = format.fields[i];
      if (num_rows == kGroupRows) pack_rows_of_field(f, src + b * format.block_bytes + f.offset, row_stride, plane);
      for (int row = 0; row < num_rows && num_rows < kGroupRows; ++row)
        pack_field(f, src + row * row_stride + b * format.block_bytes, row, plane);
      plane += kGroupRows * f.unit * f.count;
    }
  }
}

void unpack_group(const FormatInfo& format, const uint8_t* src, int num_rows, int64_t cols, uint8_t* dst, int64_t row_stride) {
  const int64_t num_blocks = cols / format.block_cols;
  for (int64_t b = 0; b < num_blocks; ++b) {
    const uint8_t* plane = src + b * group_block_bytes(format);
    for (int row = 0; row < num_rows && format.recoded_bytes; ++row)
      restore_block(format, plane, row, dst + row * row_stride + b * format.block_bytes);
    for (int i = 0; i < format.num_fields; ++i) {
      const Field& f = format.fields[i];
      for (int row = 0; row < num_rows; ++row)
        unpack_field(f, plane, row, dst + row * row_stride + b * format.block_bytes);
      plane += kGroupRows * f.unit * f.count;
    }
  }
}

}  // namespace hybrid
