#include "simd_avx512.h"
// The tile instructions, or functions that stand in for them.
#ifdef KERNEL_AMX_TILES
#include KERNEL_AMX_TILES
#endif

#include "codebooks.h"
#include "dispatch.h"

namespace hybrid {
namespace {

#include "formats_plain.inc"

#include "formats_codebook.inc"

#include "formats_vbmi.inc"

#include "dot_body.inc"

#include "amx_expand.inc"

#include "amx_gemm.inc"

// Four sums of two tiles of activations times two of weights, as in a step, from registers alone.
int32_t multiply_bytes(int64_t num_rounds) {
  alignas(64) int8_t bytes[kTileBytes];
  alignas(64) int32_t sums[4][kGroupRows][kGroupRows];
  for (int i = 0; i < kTileBytes; ++i) bytes[i] = static_cast<int8_t>(i);
  configure_tiles(16, 64);
  settle_memory();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, bytes, 64);
  _tile_loadd(5, bytes, 64);
  _tile_loadd(6, bytes, 64);
  _tile_loadd(7, bytes, 64);
  for (int64_t round = 0; round < num_rounds; ++round) {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  _tile_stored(0, sums[0], 64);
  _tile_stored(1, sums[1], 64);
  _tile_stored(2, sums[2], 64);
  _tile_stored(3, sums[3], 64);
  _tile_release();
  return sums[0][0][0] + sums[1][0][0] + sums[2][0][0] + sums[3][0][0];
}
constexpr int64_t kMacsPerRound = 4 * 16 * 16 * 64;

#define ROW_q8(format)                                                                                         \
  {find_format_named(#format), ActFormat::q8, Isa::kAmx, 16, "gemm_" #format "_q8_16x16_amx", nullptr, \
   gemm_amx<Fmt_##format>, nullptr},
#define ROW_f32(format)
#define ROW(format, activation, ...) ROW_##activation(format)

constexpr KernelRow kRows[] = {
#include "kernels.inc"
};

}  // namespace

// Rows without `dot` and `expand`: dispatch.cc takes those of avx512vbmi.
const IsaKernels kKernelsAmx = {kRows, sizeof(kRows) / sizeof(kRows[0]), nullptr, multiply_bytes, kMacsPerRound};

}  // namespace hybrid
