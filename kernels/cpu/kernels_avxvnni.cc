#include "simd_avxvnni.h"

#define KERNEL_ISA Isa::kAvxVnni
#define KERNEL_ISA_NAME "avxvnni"
#define KERNEL_TABLE kKernelsAvxVnni
#define TILE(scalar, avx2, avxvnni, avx512vnni, avx512vbmi, amx) avxvnni
#include "kernels_body.inc"
