#include "recode.h"

#include <cstring>

#include "codebooks.h"
#include "kernel_abi.h"

namespace hybrid {
namespace {

constexpr int kTritBytes = 52, kEntries = 2048, kNumTrits = 260;  // 256 weights and four digits to spare
constexpr int kAfterTrits = kTritBytes * kGroupRows;                 // offset of what follows them in a group

// Bytes of a row from `first` on: digit n of byte i is trit start + n * width + i.
struct Run {
  int first, width, start;
};
constexpr Run kRuns[] = {{0, 32, 0}, {32, 16, 160}, {48, 4, 240}};

uint64_t trits_of_entry(int index) {
  uint64_t trits = 0;
  for (int c = 0; c < 8; ++c) {
    const auto weight = static_cast<int8_t>(kGridIQ1S[2 * index + c / 4] >> (8 * (c % 4)) & 0xff);
    trits |= static_cast<uint64_t>(weight / 8 + 1) << (8 * c);
  }
  return trits;
}
template <class Trit>
int number_of(Trit trit) {
  int number = 0;
  for (int c = 0; c < 8; ++c) number = 3 * number + trit(c);
  return number;
}

struct Tables {
  uint64_t entry_trits[kEntries];
  int16_t entry_of[6561] = {};  // by the number whose digits the trits are
  uint8_t byte_of[243], digits_of[256][5];

  Tables() {
    for (int i = 0; i < kEntries; ++i) {
      entry_trits[i] = trits_of_entry(i);
      entry_of[number_of([&](int c) { return static_cast<int>(entry_trits[i] >> (8 * c) & 3); })] = static_cast<int16_t>(i);
    }
    for (int v = 0; v < 243; ++v) byte_of[v] = static_cast<uint8_t>((v * 256 + 242) / 243);
    for (int byte = 0; byte < 256; ++byte) {
      auto x = static_cast<uint8_t>(byte);
      for (uint8_t& digit : digits_of[byte]) {
        digit = static_cast<uint8_t>(x * 3 >> 8);
        x = static_cast<uint8_t>(x * 3);
      }
    }
  }
};
const Tables& tables() {
  static const Tables built;
  return built;
}

// A row's weights plus one; the last four are free.
struct Trits {
  uint8_t of_column[kNumTrits] = {};
};

void set_entry(Trits& trits, int entry, int index) {
  std::memcpy(trits.of_column + 8 * entry, &tables().entry_trits[index], 8);
}
int index_of(const Trits& trits, int entry) {
  return tables().entry_of[number_of([&](int c) { return int{trits.of_column[8 * entry + c]}; })];
}

void store_trits(const Trits& trits, int row, uint8_t* packed) {
  const Tables& table = tables();
  for (const Run& run : kRuns) {
    for (int i = 0; i < run.width; ++i) {
      const uint8_t* trit = trits.of_column + run.start + i;
      int number = 0;
      for (int n = 0; n < 5; ++n) number = 3 * number + trit[n * run.width];
      const int at = run.first + i;
      packed[(at / 4 * kGroupRows + row) * 4 + at % 4] = table.byte_of[number];
    }
  }
}
Trits load_trits(const uint8_t* packed, int row) {
  Trits trits;
  for (const Run& run : kRuns) {
    for (int i = 0; i < run.width; ++i) {
      const int at = run.first + i;
      const uint8_t* digits = tables().digits_of[packed[(at / 4 * kGroupRows + row) * 4 + at % 4]];
      for (int n = 0; n < 5; ++n) trits.of_column[run.start + n * run.width + i] = digits[n];
    }
  }
  return trits;
}

// Blocks as in the file.
struct BlockIQ1S {
  uint8_t d[2], qs[32], qh[16];
};
struct BlockIQ1M {
  uint8_t qs[32], qh[16], scales[8];
};
static_assert(sizeof(BlockIQ1S) == 50 && sizeof(BlockIQ1M) == 56);

// Behind the trits of IQ1_S.
constexpr int kScalesAt = kAfterTrits, kSignsAt = kScalesAt + 3 * kGroupRows, kDeltaAt = kAfterTrits;
constexpr int kDAt = kSignsAt + kGroupRows / 2;

void recode_iq1_s(const BlockIQ1S& block, int row, uint8_t* packed) {
  Trits trits;
  uint32_t scales = 0, signs = 0;
  for (int s = 0; s < 8; ++s) {
    const uint32_t qh = block.qh[2 * s] | static_cast<uint32_t>(block.qh[2 * s + 1]) << 8;
    for (int e = 0; e < 4; ++e) {
      const uint32_t high = qh >> (3 * e) & 7;
      set_entry(trits, 4 * s + e, static_cast<int>(block.qs[4 * s + e] | high << 8));
    }
    scales |= (qh >> 12 & 7) << (3 * s);
    signs |= qh >> 15 << s;
  }
  for (int b = 0; b < 4; ++b) trits.of_column[256 + b] = signs >> (4 + b) & 1;
  store_trits(trits, row, packed);
  for (int i = 0; i < 3; ++i) packed[kScalesAt + i * kGroupRows + row] = static_cast<uint8_t>(scales >> (8 * i));
  packed[kSignsAt + row % 8] |= static_cast<uint8_t>((signs & 15) << (row < 8 ? 0 : 4));
  std::memcpy(packed + kDAt + 2 * row, block.d, 2);
}
void restore_iq1_s(const uint8_t* packed, int row, BlockIQ1S& block) {
  const Trits trits = load_trits(packed, row);
  uint32_t scales = 0, signs = packed[kSignsAt + row % 8] >> (row < 8 ? 0 : 4) & 15;
  for (int i = 0; i < 3; ++i) scales |= static_cast<uint32_t>(packed[kScalesAt + i * kGroupRows + row]) << (8 * i);
  for (int b = 0; b < 4; ++b) signs |= static_cast<uint32_t>(trits.of_column[256 + b]) << (4 + b);
  for (int s = 0; s < 8; ++s) {
    uint32_t qh = (scales >> (3 * s) & 7) << 12 | (signs >> s & 1) << 15;
    for (int e = 0; e < 4; ++e) {
      const int index = index_of(trits, 4 * s + e);
      block.qs[4 * s + e] = static_cast<uint8_t>(index);
      qh |= static_cast<uint32_t>(index >> 8) << (3 * e);
    }
    block.qh[2 * s] = static_cast<uint8_t>(qh);
    block.qh[2 * s + 1] = static_cast<uint8_t>(qh >> 8);
  }
  std::memcpy(block.d, packed + kDAt + 2 * row, 2);
}

void recode_iq1_m(const BlockIQ1M& block, int row, uint8_t* packed) {
  Trits trits;
  uint32_t signs = 0;
  for (int g = 0; g < 32; ++g) {
    const uint32_t nibble = block.qh[g / 2] >> (4 * (g % 2)) & 15;
    set_entry(trits, g, static_cast<int>(block.qs[g] | (nibble & 7) << 8));
    signs |= nibble >> 3 << g;
  }
  store_trits(trits, row, packed);
  std::memcpy(packed + kDeltaAt + 4 * row, &signs, 4);
  for (int i = 0; i < 2; ++i)
    std::memcpy(packed + kDeltaAt + (1 + i) * 4 * kGroupRows + 4 * row, block.scales + 4 * i, 4);
}
void restore_iq1_m(const uint8_t* packed, int row, BlockIQ1M& block) {
  const Trits trits = load_trits(packed, row);
  uint32_t signs;
  std::memcpy(&signs, packed + kDeltaAt + 4 * row, 4);
  std::memset(block.qh, 0, sizeof block.qh);
  for (int g = 0; g < 32; ++g) {
    const int index = index_of(trits, g);
    block.qs[g] = static_cast<uint8_t>(index);
    const uint32_t nibble = static_cast<uint32_t>(index >> 8) | (signs >> g & 1) << 3;
    block.qh[g / 2] |= static_cast<uint8_t>(nibble << (4 * (g % 2)));
  }
  for (int i = 0; i < 2; ++i)
    std::memcpy(block.scales + 4 * i, packed + kDeltaAt + (1 + i) * 4 * kGroupRows + 4 * row, 4);
}

}  // namespace

void recode_block(const FormatInfo& format, const uint8_t* block, int row, uint8_t* packed) {
  if (format.block_bytes == sizeof(BlockIQ1S)) {
    BlockIQ1S from;
    std::memcpy(&from, block, sizeof from);
    recode_iq1_s(from, row, packed);
  } else {
    BlockIQ1M from;
    std::memcpy(&from, block, sizeof from);
    recode_iq1_m(from, row, packed);
  }
}

void restore_block(const FormatInfo& format, const uint8_t* packed, int row, uint8_t* block) {
  if (format.block_bytes == sizeof(BlockIQ1S)) {
    BlockIQ1S to;
    restore_iq1_s(packed, row, to);
    std::memcpy(block, &to, sizeof to);
  } else {
    BlockIQ1M to;
    restore_iq1_m(packed, row, to);
    std::memcpy(block, &to, sizeof to);
  }
}

}  // namespace hybrid
