// GGUF rows to packed 16-row groups and back; the layout is stated in block_formats.h.
#pragma once
#include <cstdint>

#include "block_formats.h"

namespace hybrid {

// Packs rows [0, num_rows) of one group, num_rows <= 16; missing rows become zero blocks.
// src: num_rows rows of (cols / block_cols) blocks each, `row_stride` bytes apart. dst: 16 rows' bytes.
void pack_group(const FormatInfo& format, const uint8_t* src, int64_t row_stride, int num_rows, int64_t cols, uint8_t* dst);

// The inverse: writes num_rows GGUF rows, `row_stride` bytes apart.
void unpack_group(const FormatInfo& format, const uint8_t* src, int num_rows, int64_t cols, uint8_t* dst, int64_t row_stride);

}  // namespace hybrid
