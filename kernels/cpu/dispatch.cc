#include "dispatch.h"

namespace hybrid {

const IsaKernels& kernels_of(Isa isa) {
  switch (isa) {
    case Isa::kAvx512Vbmi: return kKernelsAvx512Vbmi;
    case Isa::kAvx512Vnni: return kKernelsAvx512Vnni;
    case Isa::kAvxVnni: return kKernelsAvxVnni;
    case Isa::kAvx2: return kKernelsAvx2;
    case Isa::kScalar: break;
  }
  return kKernelsScalar;
}

std::vector<const KernelRow*> all_kernel_rows() {
  std::vector<const KernelRow*> rows;
  for (int i = 0; i < kNumIsas; ++i) {
    const IsaKernels& kernels = kernels_of(static_cast<Isa>(i));
    for (int k = 0; k < kernels.num_rows; ++k)
      if (kernels.rows[k].dot) rows.push_back(&kernels.rows[k]);
  }
  return rows;
}

const KernelRow* select_kernel(const FormatInfo& format, Isa isa) {
  const IsaKernels& kernels = kernels_of(isa);
  for (int k = 0; k < kernels.num_rows; ++k)
    if (kernels.rows[k].format == &format && kernels.rows[k].dot) return &kernels.rows[k];
  return isa == Isa::kAvx512Vbmi ? select_kernel(format, Isa::kAvx512Vnni) : nullptr;
}

}  // namespace hybrid
