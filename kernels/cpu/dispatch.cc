#include "dispatch.h"

#include <vector>

namespace hybrid {
namespace {

// The rows of amx, each with the products of few tokens of the ISA it extends.
struct AmxKernels {
  std::vector<KernelRow> rows{kKernelsAmx.rows, kKernelsAmx.rows + kKernelsAmx.num_rows};
  IsaKernels kernels = kKernelsAmx;

  AmxKernels() {
    for (KernelRow& row : rows) {
      const KernelRow* extended = select_kernel(*row.format, Isa::kAvx512Vbmi);
      row.dot = extended->dot;
      row.expand = extended->expand;
    }
    kernels.rows = rows.data();
    kernels.quantize_row = kKernelsAvx512Vbmi.quantize_row;
  }
};
const IsaKernels& amx_kernels() {
  static const AmxKernels built;
  return built.kernels;
}

}  // namespace

const IsaKernels& kernels_of(Isa isa) {
  switch (isa) {
    case Isa::kAmx: return amx_kernels();
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
  if (isa == Isa::kAmx) return select_kernel(format, Isa::kAvx512Vbmi);
  return isa == Isa::kAvx512Vbmi ? select_kernel(format, Isa::kAvx512Vnni) : nullptr;
}

}  // namespace hybrid
