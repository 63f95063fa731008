// Which kernel runs for a format on an ISA: the rows of kernels.inc, and a pure choice among them.
#pragma once
#include <vector>

#include "block_formats.h"
#include "isa.h"
#include "kernel_abi.h"

namespace hybrid {

enum class ActFormat : int { q8, f32 };

struct KernelRow {
  const FormatInfo* format;
  ActFormat activation;
  Isa isa;
  int tile;          // tokens taken at once
  const char* name;  // e.g. dot_Q4_K_q8_16x8_avx512vnni, gemm_Q4_K_q8_16x16_amx
  GroupKernel dot;
  GroupGemm gemm;  // null for float formats
  GroupExpand expand;
};

using QuantizeRow = void (*)(const float* x, int64_t cols, int8_t* codes, float* scales, int16_t* sums);

// What one ISA's translation unit provides. Rows of formats it leaves to another ISA have no `dot`; those of amx have
// `gemm` alone, and it has no quantize_row, until dispatch.cc adds what avx512vbmi has.
struct IsaKernels {
  const KernelRow* rows;
  int num_rows;
  QuantizeRow quantize_row;
  // Int8 products as fast as may be, from the first-level cache; the result means nothing.
  int32_t (*multiply_bytes)(int64_t num_rounds);
  int64_t macs_per_round;
};
inline constexpr int64_t kMacsPerWord = 6 * 8 * 4;  // of a lane in a round

extern const IsaKernels kKernelsScalar, kKernelsAvx2, kKernelsAvxVnni, kKernelsAvx512Vnni, kKernelsAvx512Vbmi, kKernelsAmx;

const IsaKernels& kernels_of(Isa isa);

// Every row of the table, host support or not.
std::vector<const KernelRow*> all_kernel_rows();

// The ISA's own kernel, or where it has none that of the ISA it extends (amx: avx512vbmi, which extends avx512vnni).
// Null when there is none.
const KernelRow* select_kernel(const FormatInfo& format, Isa isa);

}  // namespace hybrid
