#pragma once

#include <string_view>

namespace sluice {

/// Instruction tiers of the host kernels, worst first. All give the same bits.
enum class CpuIsa { kScalar, kAvx2, kAvx512 };

/// The best tier of this machine, or the one that SLUICE_CPU_ISA names ("scalar", "avx2",
/// "avx512"). Read once.
/// Errors: ConfigError when the variable names no tier, or one this machine lacks.
[[nodiscard]] CpuIsa cpu_isa();
[[nodiscard]] bool cpu_supports(CpuIsa isa);
[[nodiscard]] std::string_view cpu_isa_name(CpuIsa isa) noexcept;

}  // namespace sluice
