#pragma once

#include <cstdint>
#include <string_view>

#include "base/dtype.h"
#include "kernels/cpu_isa.h"

namespace sluice {

/// The functions between an expert's two GEMMs that have kernels. `g` and `u` are a gate and an up
/// value; kRelu2 and the k…Only have no gate and see `u` alone.
enum class GateKind : std::uint8_t {
  kSilu,         ///< silu(g) * u (SwiGLU: Mixtral, Qwen, DeepSeek, …)
  kGelu,         ///< gelu(g) * u, with erf
  kGeluTanh,     ///< gelu(g) * u, tanh approximation (Gemma-4)
  kClampedSilu,  ///< silu(min(g, limit)) * clamp(u, -limit, limit) (DeepSeek-V4)
  kOaiSwiglu,    ///< g' = min(g, limit), u' = clamp(u, ±limit): g' sigmoid(alpha g') (u' + 1)
                 ///< (gpt-oss)
  kRelu,         ///< relu(g) * u
  kRelu2,        ///< relu(u)^2, not gated (Nemotron-H)
  kSiluOnly,     ///< silu(u), not gated
  kGeluOnly,     ///< gelu(u) with erf, not gated
  kReluOnly,     ///< relu(u), not gated
  kGeneric,      ///< none of these: the caller's callback computes it
};

/// A gate function with its parameters.
struct GateSpec {
  GateKind kind = GateKind::kSilu;
  /// Gate row i is row 2i of w13 and its up row 2i + 1, instead of i and I + i.
  bool interleaved = false;
  float alpha = 1.702f;
  float limit = 7.0f;

  bool operator==(const GateSpec&) const = default;
};

[[nodiscard]] constexpr bool is_gated(GateKind kind) noexcept {
  return kind != GateKind::kRelu2 && kind != GateKind::kSiluOnly && kind != GateKind::kGeluOnly &&
         kind != GateKind::kReluOnly;
}
/// "silu", "gelu", "gelu_tanh", "clamped_silu", "oai_swiglu", "relu", "relu2", "silu_only",
/// "gelu_only", "relu_only", "generic".
[[nodiscard]] std::string_view gate_name(GateKind kind) noexcept;
/// Errors: ConfigError on a name that `gate_name` does not give.
[[nodiscard]] GateKind parse_gate(std::string_view name);

/// out[r, i] = gate function of row r, in fp32. In place is allowed where out == gate_up and the
/// kind has no gate. The scalar definition and every vector tier give the same bits (the
/// transcendentals are our own polynomial, not libm's).
/// Errors: InternalError for kGeneric.
///
/// Shapes: gate_up [rows, 2I] ([rows, I] without a gate), out [rows, I].
void apply_gate(const GateSpec& spec, const float* gate_up, float* out, std::int64_t rows,
                std::int64_t intermediate);

/// The same with a named tier, for tests.
/// Errors: ConfigError when this machine lacks it.
void apply_gate(CpuIsa isa, const GateSpec& spec, const float* gate_up, float* out,
                std::int64_t rows, std::int64_t intermediate);

}  // namespace sluice
