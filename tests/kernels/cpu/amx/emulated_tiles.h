// The tile instructions that kernels_amx.cc uses, as functions: KERNEL_AMX_TILES includes them after immintrin.h.
//
// State is a thread's, as that of the processor is. What would raise an exception there, and what the manual leaves
// undefined, prints a line and aborts. Behaviour: Intel 64 and IA-32 Architectures Software Developer's Manual,
// volume 2, LDTILECFG, TILELOADD, TILESTORED, TDPBSSD.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbssd
#undef _tile_dpbsud
#define _tile_loadconfig emulated_loadconfig
#define _tile_release emulated_release

namespace {

constexpr int kNumTiles = 8, kMostRows = 16, kMostRowBytes = 64;

struct Tile {
  int rows = 0, row_bytes = 0;
  uint8_t data[kMostRows][kMostRowBytes];
};
struct TileState {
  bool configured = false;
  Tile tiles[kNumTiles];
  long products = 0, loads = 0, stores = 0, configurations = 0;
};
inline thread_local TileState tile_state;

inline void require(bool good, const char* instruction, const char* what) {
  if (good) return;
  std::fprintf(stderr, "%s: %s\n", instruction, what);
  std::abort();
}

inline void emulated_loadconfig(const void* from) {
  constexpr const char* kName = "ldtilecfg";
  uint8_t bytes[64];
  std::memcpy(bytes, from, 64);
  require(bytes[0] == 1, kName, "the palette must be 1");
  require(bytes[1] == 0, kName, "start_row must be 0 before any instruction was interrupted");
  for (int i = 2; i < 16; ++i) require(bytes[i] == 0, kName, "reserved bytes must be zero");
  for (int i = 0; i < 16; ++i) {
    uint16_t row_bytes;
    std::memcpy(&row_bytes, bytes + 16 + 2 * i, 2);
    const uint8_t rows = bytes[48 + i];
    require(i < kNumTiles || (rows == 0 && row_bytes == 0), kName, "palette 1 has eight tiles");
    require(rows <= kMostRows, kName, "a tile has up to 16 rows");
    require(row_bytes <= kMostRowBytes, kName, "a row has up to 64 bytes");
    require((rows == 0) == (row_bytes == 0), kName, "rows and bytes of a row must both be zero, or neither");
    if (i >= kNumTiles) continue;
    tile_state.tiles[i].rows = rows;
    tile_state.tiles[i].row_bytes = row_bytes;
    std::memset(tile_state.tiles[i].data, 0, sizeof tile_state.tiles[i].data);
  }
  tile_state.configured = true;
  ++tile_state.configurations;
}

inline void emulated_release() {
  tile_state.configured = false;
  for (Tile& tile : tile_state.tiles) tile = Tile{};
}

inline Tile& usable_tile(int index, const char* instruction) {
  require(tile_state.configured, instruction, "no tiles are configured");
  require(index >= 0 && index < kNumTiles, instruction, "there is no such tile");
  Tile& tile = tile_state.tiles[index];
  require(tile.rows > 0, instruction, "the tile has no rows");
  return tile;
}

inline void _tile_zero(int index) {
  Tile& tile = usable_tile(index, "tilezero");
  std::memset(tile.data, 0, sizeof tile.data);
}

inline void _tile_loadd(int index, const void* from, int64_t stride) {
  Tile& tile = usable_tile(index, "tileloadd");
  std::memset(tile.data, 0, sizeof tile.data);
  for (int r = 0; r < tile.rows; ++r)
    std::memcpy(tile.data[r], static_cast<const uint8_t*>(from) + r * stride, static_cast<size_t>(tile.row_bytes));
  ++tile_state.loads;
}

inline void _tile_stored(int index, void* to, int64_t stride) {
  const Tile& tile = usable_tile(index, "tilestored");
  for (int r = 0; r < tile.rows; ++r)
    std::memcpy(static_cast<uint8_t*>(to) + r * stride, tile.data[r], static_cast<size_t>(tile.row_bytes));
  ++tile_state.stores;
}

// sum += left * right, by dwords of four bytes; bytes of `left` are signed, those of `right` of type Right.
template <class Right>
void multiply_tiles(int sum_index, int left_index, int right_index, const char* instruction) {
  require(sum_index != left_index && sum_index != right_index && left_index != right_index, instruction,
          "the three tiles must differ");
  Tile& sum = usable_tile(sum_index, instruction);
  const Tile &left = usable_tile(left_index, instruction), &right = usable_tile(right_index, instruction);
  require(left.row_bytes % 4 == 0 && right.row_bytes % 4 == 0, instruction, "rows must be whole dwords");
  require(left.rows == sum.rows, instruction, "the first factor and the sums must have as many rows");
  require(right.row_bytes == sum.row_bytes, instruction, "the second factor and the sums must have rows of one length");
  require(left.row_bytes / 4 == right.rows, instruction, "the first factor must have a dword for each row of the second");
  for (int m = 0; m < sum.rows; ++m) {
    int32_t row[kMostRowBytes / 4];
    std::memcpy(row, sum.data[m], sizeof row);
    for (int k = 0; k < right.rows; ++k) {
      for (int n = 0; n < sum.row_bytes / 4; ++n) {
        for (int i = 0; i < 4; ++i)
          row[n] += static_cast<int8_t>(left.data[m][4 * k + i]) * static_cast<Right>(right.data[k][4 * n + i]);
      }
    }
    std::memcpy(sum.data[m], row, sizeof row);
  }
  ++tile_state.products;
}
inline void _tile_dpbssd(int sum, int left, int right) { multiply_tiles<int8_t>(sum, left, right, "tdpbssd"); }
inline void _tile_dpbsud(int sum, int left, int right) { multiply_tiles<uint8_t>(sum, left, right, "tdpbsud"); }

}  // namespace
