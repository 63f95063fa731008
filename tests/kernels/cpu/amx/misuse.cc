// What emulated_tiles.h must not let pass. The argument names a case; every one of them but `good` aborts.
#include "emulated_tiles.h"

#include <string>

namespace {

struct Config {
  uint8_t bytes[64] = {};
  Config() {
    bytes[0] = 1;
    for (int i = 0; i < 8; ++i) set(i, 16, 64);
  }
  void set(int tile, int rows, int row_bytes) {
    bytes[48 + tile] = static_cast<uint8_t>(rows);
    bytes[16 + 2 * tile] = static_cast<uint8_t>(row_bytes);
    bytes[17 + 2 * tile] = static_cast<uint8_t>(row_bytes >> 8);
  }
};

}  // namespace

int main(int, char** arguments) {
  const std::string name = arguments[1];
  Config config;
  if (name == "palette") config.bytes[0] = 2;
  if (name == "start_row") config.bytes[1] = 1;
  if (name == "reserved") config.bytes[5] = 1;
  if (name == "rows") config.set(3, 17, 64);
  if (name == "row_bytes") config.set(3, 16, 68);
  if (name == "wide_row_bytes") config.set(3, 16, 256 + 64);
  if (name == "half_configured") config.set(3, 16, 0);
  if (name == "ninth_tile") config.set(8, 16, 64);
  if (name == "no_rows") config.set(0, 0, 0);
  if (name == "sums_and_left") config.set(4, 8, 64);
  if (name == "sums_and_right") config.set(6, 16, 32);
  if (name == "left_and_right") config.set(4, 16, 32);
  if (name == "no_dwords") config.set(4, 16, 62);
  static uint8_t memory[1024];
  if (name != "unconfigured") _tile_loadconfig(&config);
  if (name == "released") _tile_release();
  _tile_zero(0);
  _tile_loadd(4, memory, 64);
  _tile_loadd(6, memory, 64);
  if (name == "load") _tile_loadd(8, memory, 64);
  if (name == "store") _tile_stored(-1, memory, 64);
  if (name == "same") _tile_dpbssd(0, 0, 6);
  _tile_dpbssd(0, 4, 6);
  _tile_dpbsud(0, 4, 6);
  _tile_stored(0, memory, 64);
  _tile_release();
  return name == "good" ? 0 : 2;
}
