#include "isa.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstring>

#if !defined(__x86_64__)
#error "the CPU kernels are written for x86-64"
#endif

namespace hybrid {
namespace {

struct Cpuid {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Cpuid cpuid(uint32_t leaf, uint32_t subleaf) {
  Cpuid r;
  if (!__get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx)) return {};
  return r;
}

uint64_t xcr0() {
  uint32_t lo, hi;
  __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return (uint64_t{hi} << 32) | lo;
}

// Linux hands out AMX tile state only on request. What it grants holds for every thread of the process.
bool request_amx_permission() {
  constexpr long kArchReqXcompPerm = 0x1023;
  constexpr long kXfeatureTileData = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTileData) == 0;
}

#ifdef HYBRID_EMULATE_AMX
constexpr bool kTilesEmulated = true;
#else
constexpr bool kTilesEmulated = false;
#endif

std::vector<Feature> detect() {
  const Cpuid l1 = cpuid(1, 0), l7 = cpuid(7, 0), l7s1 = cpuid(7, 1);
  auto bit = [](uint32_t word, int n) { return ((word >> n) & 1) != 0; };
  const uint64_t os = bit(l1.ecx, 27) ? xcr0() : 0;
  const bool ymm = (os & 0x6) == 0x6;
  const bool zmm = (os & 0xe6) == 0xe6;
  const bool tiles = (os & 0x60000) == 0x60000 && bit(l7.edx, 24) && request_amx_permission();
  return {
      {"avx2", ymm && bit(l7.ebx, 5)},
      {"fma", ymm && bit(l1.ecx, 12)},
      {"f16c", ymm && bit(l1.ecx, 29)},
      {"bmi2", bit(l7.ebx, 8)},
      {"avxvnni", ymm && bit(l7s1.eax, 4)},
      {"avx512f", zmm && bit(l7.ebx, 16)},
      {"avx512bw", zmm && bit(l7.ebx, 30)},
      {"avx512vl", zmm && bit(l7.ebx, 31)},
      {"avx512dq", zmm && bit(l7.ebx, 17)},
      {"avx512vnni", zmm && bit(l7.ecx, 11)},
      {"avx512vbmi", zmm && bit(l7.ecx, 1)},
      {"gfni", bit(l7.ecx, 8)},
      {"avx512bf16", zmm && bit(l7s1.eax, 5)},
      {"amx_tile", kTilesEmulated || tiles},
      {"amx_int8", kTilesEmulated || (tiles && bit(l7.edx, 25))},
      {"amx_bf16", tiles && bit(l7.edx, 22)},
  };
}

const std::vector<Feature>& features() {
  static const std::vector<Feature> detected = detect();
  return detected;
}

std::vector<const char*> required(Isa isa) {
  switch (isa) {
    case Isa::kScalar: return {};
    case Isa::kAvx2: return {"avx2", "fma", "f16c", "bmi2"};
    case Isa::kAvxVnni: return {"avx2", "fma", "f16c", "bmi2", "avxvnni"};
    case Isa::kAvx512Vnni:
      return {"avx2", "fma", "f16c", "bmi2", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni"};
    case Isa::kAvx512Vbmi:
      return {"avx2",     "fma",      "f16c",       "bmi2",       "avx512f", "avx512bw",
              "avx512vl", "avx512dq", "avx512vnni", "avx512vbmi", "gfni"};
    case Isa::kAmx:
      return {"avx2",     "fma",        "f16c",       "bmi2", "avx512f",  "avx512bw", "avx512vl",
              "avx512dq", "avx512vnni", "avx512vbmi", "gfni", "amx_tile", "amx_int8"};
  }
  return {};
}

std::atomic<int>& chosen() {
  static std::atomic<int> isa = static_cast<int>(best_isa());
  return isa;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kScalar: return "scalar";
    case Isa::kAvx2: return "avx2";
    case Isa::kAvxVnni: return "avxvnni";
    case Isa::kAvx512Vnni: return "avx512vnni";
    case Isa::kAvx512Vbmi: return "avx512vbmi";
    case Isa::kAmx: return "amx";
  }
  return "?";
}

std::vector<Feature> cpu_features() { return features(); }

std::vector<std::string> isa_missing(Isa isa) {
  std::vector<std::string> missing;
  for (const char* name : required(isa))
    for (const Feature& f : features())
      if (std::strcmp(f.name, name) == 0 && !f.present) missing.emplace_back(name);
  return missing;
}

bool isa_supported(Isa isa) { return isa_missing(isa).empty(); }

Isa best_isa() {
  Isa best = Isa::kScalar;
  for (int i = 0; i < kNumIsas; ++i)
    if (isa_supported(static_cast<Isa>(i))) best = static_cast<Isa>(i);
  return best;
}

Isa current_isa() { return static_cast<Isa>(chosen().load(std::memory_order_relaxed)); }

void set_current_isa(Isa isa) { chosen().store(static_cast<int>(isa), std::memory_order_relaxed); }

}  // namespace hybrid
