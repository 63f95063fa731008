#include "simd_avx2.h"

#define KERNEL_ISA Isa::kAvx2
#define KERNEL_ISA_NAME "avx2"
#define KERNEL_TABLE kKernelsAvx2
#define TILE(scalar, avx2, avxvnni, avx512vnni, avx512vbmi, amx) avx2
#include "kernels_body.inc"
