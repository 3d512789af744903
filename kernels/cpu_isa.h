#pragma once

#include <array>
#include <string_view>

namespace sluice {

/// Instruction tiers of the host kernels, worst first. All give the same bits.
enum class CpuIsa { kScalar, kAvx2, kAvx512 };
inline constexpr std::array kCpuIsas{CpuIsa::kScalar, CpuIsa::kAvx2, CpuIsa::kAvx512};

/// The best tier of this machine, or the one that SLUICE_CPU_ISA names ("scalar", "avx2",
/// "avx512"). Read once.
/// Errors: ConfigError when the variable names no tier, or one this machine lacks.
[[nodiscard]] CpuIsa cpu_isa();
[[nodiscard]] bool cpu_supports(CpuIsa isa);
[[nodiscard]] std::string_view cpu_isa_name(CpuIsa isa) noexcept;
/// Errors: ConfigError that begins with `what` on a name that `cpu_isa_name` does not give.
[[nodiscard]] CpuIsa parse_cpu_isa(std::string_view what, std::string_view name);

}  // namespace sluice
