// Instruction sets the kernels are built for, and which of them this host can run.
#pragma once
#include <string>
#include <vector>

namespace hybrid {

// Ascending preference. Names are features, not chips: scalar is baseline x86-64; avx2 adds FMA,
// F16C and BMI2; avxvnni is avx2 with VNNI on 256 bits; avx512vnni means F, BW, VL, DQ and VNNI; avx512vbmi
// adds VBMI and GFNI; amx adds tiles of int8 to that.
enum class Isa : int { kScalar = 0, kAvx2 = 1, kAvxVnni = 2, kAvx512Vnni = 3, kAvx512Vbmi = 4, kAmx = 5 };
inline constexpr int kNumIsas = 6;

const char* isa_name(Isa isa);

// CPUID features that matter here, with the operating system's part (XCR0, AMX permission)
// already taken into account. Includes features no kernel uses yet, for reports.
struct Feature {
  const char* name;
  bool present;
};
std::vector<Feature> cpu_features();

bool isa_supported(Isa isa);

// The features of `isa` this host lacks; empty when it is supported.
std::vector<std::string> isa_missing(Isa isa);

Isa best_isa();  // the last supported one

// The process-wide choice. Starts as best_isa().
Isa current_isa();
void set_current_isa(Isa isa);

}  // namespace hybrid
