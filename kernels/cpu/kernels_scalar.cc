#include "simd_scalar.h"

#define KERNEL_ISA Isa::kScalar
#define KERNEL_ISA_NAME "scalar"
#define KERNEL_TABLE kKernelsScalar
#define TILE(scalar, avx2, avxvnni, avx512vnni, avx512vbmi, amx) scalar
#include "kernels_body.inc"
