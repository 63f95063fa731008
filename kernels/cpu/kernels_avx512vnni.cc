#include "simd_avx512.h"

#define KERNEL_ISA Isa::kAvx512Vnni
#define KERNEL_ISA_NAME "avx512vnni"
#define KERNEL_TABLE kKernelsAvx512Vnni
#define TILE(scalar, avx2, avxvnni, avx512vnni, avx512vbmi, amx) avx512vnni
#include "kernels_body.inc"
