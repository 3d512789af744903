#include "kernels/gate.h"

#include <algorithm>
#include <string>

#include "base/error.h"
#include "kernels/float_env.h"
#include "kernels/tiers.h"

namespace sluice {
namespace {

struct Name {
  GateKind kind;
  std::string_view name;
};
constexpr Name kNames[] = {
    {GateKind::kSilu, "silu"},
    {GateKind::kGelu, "gelu"},
    {GateKind::kGeluTanh, "gelu_tanh"},
    {GateKind::kClampedSilu, "clamped_silu"},
    {GateKind::kOaiSwiglu, "oai_swiglu"},
    {GateKind::kRelu, "relu"},
    {GateKind::kRelu2, "relu2"},
    {GateKind::kSiluOnly, "silu_only"},
    {GateKind::kGeluOnly, "gelu_only"},
    {GateKind::kReluOnly, "relu_only"},
    {GateKind::kGeneric, "generic"},
};

}  // namespace

std::string_view gate_name(GateKind kind) noexcept {
  for (const Name& entry : kNames) {
    if (entry.kind == kind) return entry.name;
  }
  return "?";
}

GateKind parse_gate(std::string_view name) {
  std::string known;
  for (const Name& entry : kNames) {
    if (entry.name == name) return entry.kind;
    known += (known.empty() ? "" : ", ") + std::string(entry.name);
  }
  throw ConfigError("gate: got \"" + std::string(name) + "\", expected one of " + known);
}

void apply_gate_row(const ElementwiseKernels& kernels, const GateSpec& spec, const float* gate_up,
                    float* out, std::int64_t count) {
  if (!is_gated(spec.kind)) return kernels.gate(spec, gate_up, gate_up, out, count);
  if (!spec.interleaved) return kernels.gate(spec, gate_up, gate_up + count, out, count);
  constexpr std::int64_t kChunk = 128;
  float g[kChunk];
  float u[kChunk];
  for (std::int64_t begin = 0; begin < count; begin += kChunk) {
    const std::int64_t chunk = std::min(kChunk, count - begin);
    for (std::int64_t i = 0; i < chunk; ++i) {
      g[i] = gate_up[2 * (begin + i)];
      u[i] = gate_up[2 * (begin + i) + 1];
    }
    kernels.gate(spec, g, u, out + begin, chunk);
  }
}

void apply_gate(CpuIsa isa, const GateSpec& spec, const float* gate_up, float* out,
                std::int64_t rows, std::int64_t intermediate) {
  require<InternalError>(spec.kind != GateKind::kGeneric, [] {
    return std::string("apply_gate: got the generic kind, expected one with a kernel");
  });
  const DefaultFloatEnv env;
  const ElementwiseKernels& kernels = elementwise_kernels(isa);
  const std::int64_t columns = (is_gated(spec.kind) ? 2 : 1) * intermediate;
  for (std::int64_t r = 0; r < rows; ++r) {
    apply_gate_row(kernels, spec, gate_up + r * columns, out + r * intermediate, intermediate);
  }
}

void apply_gate(const GateSpec& spec, const float* gate_up, float* out, std::int64_t rows,
                std::int64_t intermediate) {
  apply_gate(cpu_isa(), spec, gate_up, out, rows, intermediate);
}

}  // namespace sluice
