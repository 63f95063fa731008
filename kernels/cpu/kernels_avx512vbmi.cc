#include "simd_avx512.h"

#define KERNEL_ISA Isa::kAvx512Vbmi
#define KERNEL_ISA_NAME "avx512vbmi"
#define KERNEL_TABLE kKernelsAvx512Vbmi
#define KERNEL_FORMATS "formats_vbmi.inc"
#define TILE(scalar, avx2, avxvnni, avx512vnni, avx512vbmi, amx) avx512vbmi
#include "kernels_body.inc"
