#include "kernels/cpu_isa.h"

#include <cstdlib>
#include <string>

#include "base/error.h"
#include "kernels/tiers.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace sluice {
namespace {

#if defined(__x86_64__)
/// Clang before 15 does not know the feature by name. AVX2 is asked for too: it implies the
/// system's support of wide registers.
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

void require_tier(CpuIsa isa) {
  require<ConfigError>(cpu_supports(isa), [&] {
    return "instruction tier: got " + std::string(cpu_isa_name(isa)) +
           ", expected one this machine has; unset SLUICE_CPU_ISA or choose scalar";
  });
}

CpuIsa choose() {
  if (const char* asked = std::getenv("SLUICE_CPU_ISA"); asked != nullptr && *asked != '\0') {
    const CpuIsa isa = parse_cpu_isa("SLUICE_CPU_ISA", asked);
    require_tier(isa);
    return isa;
  }
  if (cpu_supports(CpuIsa::kAvx512)) return CpuIsa::kAvx512;
  return cpu_supports(CpuIsa::kAvx2) ? CpuIsa::kAvx2 : CpuIsa::kScalar;
}

}  // namespace

bool cpu_supports(CpuIsa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case CpuIsa::kScalar:
      return true;
    case CpuIsa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    case CpuIsa::kAvx512:
      return cpu_supports(CpuIsa::kAvx2) && __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl");
  }
  return false;
#else
  return isa == CpuIsa::kScalar;
#endif
}

CpuIsa cpu_isa() {
  static const CpuIsa kChosen = choose();
  return kChosen;
}

std::string_view cpu_isa_name(CpuIsa isa) noexcept {
  switch (isa) {
    case CpuIsa::kScalar:
      return "scalar";
    case CpuIsa::kAvx2:
      return "avx2";
    case CpuIsa::kAvx512:
      return "avx512";
  }
  return "?";
}

CpuIsa parse_cpu_isa(std::string_view what, std::string_view name) {
  for (const CpuIsa isa : kCpuIsas) {
    if (cpu_isa_name(isa) == name) return isa;
  }
  throw ConfigError(std::string(what) + ": got \"" + std::string(name) +
                    "\", expected scalar, avx2 or avx512");
}

const ElementwiseKernels& elementwise_kernels(CpuIsa isa) {
  require_tier(isa);
#if defined(__x86_64__)
  if (isa == CpuIsa::kAvx512) return kElementwiseAvx512;
  if (isa == CpuIsa::kAvx2) return kElementwiseAvx2;
#endif
  return kElementwiseScalar;
}

const DotKernels& dot_kernels(CpuIsa isa) {
  require_tier(isa);
#if defined(__x86_64__)
  if (isa == CpuIsa::kAvx512) return kDotAvx512;
  if (isa == CpuIsa::kAvx2) return kDotAvx2;
#endif
  return kDotScalar;
}

}  // namespace sluice
