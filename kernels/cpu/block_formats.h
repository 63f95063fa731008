// The formats, their GGUF blocks, and the packed layout as a table.
//
// A packed matrix is a sequence of 16-row groups; a group is its K-blocks one after another. The
// packed K-block of 16 rows holds each field of the GGUF block as [count][16 rows][unit bytes], the
// fields in the order of this table:
//
//     packed[16 * field_base + (i * 16 + row) * unit + b] = block[row][offset + i * unit + b]
//
// with field_base = the summed bytes (unit * count) of the fields before it. A code plane with unit
// 4 is therefore [K/4][16][4] once its nibbles or bits are split off. That is a permutation of the
// bytes of 16 GGUF rows: packing loses nothing and adds nothing but padding rows (zero blocks).
//
// One field is also permuted inside its 4-byte unit: the fifth bits (qh) of Q5_0 and Q5_1, where
// bit (8c + m) of the packed word is bit (4m + c) of the file's word, c < 4, m < 8. After that,
// byte c of the word holds the fifth bits of columns c, 4 + c, 8 + c ... as bits 0, 1, 2 ...
//
// IQ1_S and IQ1_M have no such fields: they are coded anew (recode.h), into `recoded_bytes` for 16 rows.
//
// Block layouts: the gguf package's `quants` module (numbers of bytes, field order).
#pragma once
#include <cstddef>
#include <cstdint>

namespace hybrid {

struct Field {
  uint16_t offset, unit, count;
  bool spread_bits = false;  // the permutation of Q5_0's and Q5_1's qh
};

struct FormatInfo {
  const char* name;
  int ggml_type;
  int block_cols;   // columns a block spans
  int block_bytes;  // bytes of one row's block in the file
  int num_fields;
  Field fields[6];
  bool is_float = false;
  int recoded_bytes = 0;  // of the packed K-block of 16 rows where that is no permutation of bytes
};

// Bytes of the packed K-block of a group.
constexpr int group_block_bytes(const FormatInfo& f) { return f.recoded_bytes ? f.recoded_bytes : 16 * f.block_bytes; }

inline constexpr FormatInfo kFormats[] = {
    {"F32", 0, 1, 4, 1, {{0, 4, 1}}, true},
    {"F16", 1, 1, 2, 1, {{0, 2, 1}}, true},
    // Two columns to a word: the operand order of bf16 dot products.
    {"BF16", 30, 2, 4, 1, {{0, 4, 1}}, true},
    {"Q4_0", 2, 32, 18, 2, {{2, 4, 4}, {0, 2, 1}}},
    {"Q4_1", 3, 32, 20, 3, {{4, 4, 4}, {0, 2, 1}, {2, 2, 1}}},
    {"Q5_0", 6, 32, 22, 3, {{6, 4, 4}, {2, 4, 1, true}, {0, 2, 1}}},
    {"Q5_1", 7, 32, 24, 4, {{8, 4, 4}, {4, 4, 1, true}, {0, 2, 1}, {2, 2, 1}}},
    {"Q8_0", 8, 32, 34, 2, {{2, 4, 8}, {0, 2, 1}}},
    {"Q2_K", 10, 256, 84, 4, {{16, 4, 16}, {0, 4, 4}, {80, 2, 1}, {82, 2, 1}}},
    {"Q3_K", 11, 256, 110, 4, {{32, 4, 16}, {0, 4, 8}, {96, 4, 3}, {108, 2, 1}}},
    {"Q4_K", 12, 256, 144, 4, {{16, 4, 32}, {4, 4, 3}, {0, 2, 1}, {2, 2, 1}}},
    {"Q5_K", 13, 256, 176, 5, {{48, 4, 32}, {16, 4, 8}, {4, 4, 3}, {0, 2, 1}, {2, 2, 1}}},
    {"Q6_K", 14, 256, 210, 4, {{0, 4, 32}, {128, 4, 16}, {192, 4, 4}, {208, 2, 1}}},
    {"IQ2_XXS", 16, 256, 66, 2, {{2, 4, 16}, {0, 2, 1}}},
    {"IQ2_XS", 17, 256, 74, 3, {{2, 4, 16}, {66, 4, 2}, {0, 2, 1}}},
    {"IQ3_XXS", 18, 256, 98, 3, {{2, 4, 16}, {66, 4, 8}, {0, 2, 1}}},
    {"IQ1_S", 19, 256, 50, 0, {}, false, 920},
    {"IQ4_NL", 20, 32, 18, 2, {{2, 4, 4}, {0, 2, 1}}},
    {"IQ3_S", 21, 256, 110, 5, {{2, 4, 16}, {66, 4, 2}, {74, 4, 8}, {106, 4, 1}, {0, 2, 1}}},
    {"IQ2_S", 22, 256, 82, 4, {{2, 4, 16}, {66, 4, 2}, {74, 4, 2}, {0, 2, 1}}},
    {"IQ4_XS", 23, 256, 136, 4, {{8, 4, 32}, {4, 4, 1}, {2, 2, 1}, {0, 2, 1}}},
    {"IQ1_M", 29, 256, 56, 0, {}, false, 1024},
    {"TQ1_0", 34, 256, 54, 3, {{0, 4, 12}, {48, 4, 1}, {52, 2, 1}}},
    {"TQ2_0", 35, 256, 66, 2, {{0, 4, 16}, {64, 2, 1}}},
    {"MXFP4", 39, 32, 17, 2, {{1, 4, 4}, {0, 1, 1}}},
};
inline constexpr int kNumFormats = sizeof(kFormats) / sizeof(kFormats[0]);

constexpr bool fields_cover_blocks() {
  for (const FormatInfo& f : kFormats) {
    int bytes = 0;
    for (int i = 0; i < f.num_fields; ++i) bytes += f.fields[i].unit * f.fields[i].count;
    if (!f.recoded_bytes && bytes != f.block_bytes) return false;
  }
  return true;
}
static_assert(fields_cover_blocks(), "every byte of a block belongs to exactly one field");

constexpr const FormatInfo* find_format(int ggml_type) {
  for (const FormatInfo& f : kFormats)
    if (f.ggml_type == ggml_type) return &f;
  return nullptr;
}

constexpr const FormatInfo* find_format_named(const char* name) {
  for (const FormatInfo& f : kFormats) {
    int i = 0;
    while (f.name[i] != 0 && f.name[i] == name[i]) ++i;
    if (f.name[i] == name[i]) return &f;
  }
  return nullptr;
}

}  // namespace hybrid
