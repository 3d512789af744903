#pragma once

#include <algorithm>
#include <cmath>

#include "kernels/gate.h"

// The gates in fp64, which the kernels of both kinds of device are held against.

namespace sluice::testing {

inline constexpr GateKind kGateKinds[] = {
    GateKind::kSilu,      GateKind::kGelu,    GateKind::kGeluTanh, GateKind::kClampedSilu,
    GateKind::kOaiSwiglu, GateKind::kRelu,    GateKind::kRelu2,    GateKind::kSiluOnly,
    GateKind::kGeluOnly,  GateKind::kReluOnly};

/// Half a unit in the last place of 1.
inline double half_ulp(DType dtype) {
  return dtype == DType::kF32 ? 0x1p-24 : dtype == DType::kF16 ? 0x1p-11 : 0x1p-8;
}

inline double exact_gate(const GateSpec& spec, double g, double u) {
  const auto sigmoid = [](double x) { return 1 / (1 + std::exp(-x)); };
  const auto gelu = [](double x) { return 0.5 * x * std::erfc(-x / std::sqrt(2.0)); };
  const double limit = spec.limit;
  switch (spec.kind) {
    case GateKind::kSilu:
      return g * sigmoid(g) * u;
    case GateKind::kGelu:
      return gelu(g) * u;
    case GateKind::kGeluTanh:
      return 0.5 * g * (1 + std::tanh(std::sqrt(2 / M_PI) * (g + 0.044715 * g * g * g))) * u;
    case GateKind::kClampedSilu:
      g = std::min(g, limit);
      return g * sigmoid(g) * std::clamp(u, -limit, limit);
    case GateKind::kOaiSwiglu:
      g = std::min(g, limit);
      return g * sigmoid(static_cast<double>(spec.alpha) * g) * (std::clamp(u, -limit, limit) + 1);
    case GateKind::kRelu:
      return std::max(g, 0.0) * u;
    case GateKind::kRelu2:
      return std::pow(std::max(u, 0.0), 2);
    case GateKind::kSiluOnly:
      return u * sigmoid(u);
    case GateKind::kGeluOnly:
      return gelu(u);
    case GateKind::kReluOnly:
      return std::max(u, 0.0);
    case GateKind::kGeneric:
      break;
  }
  return 0;
}

}  // namespace sluice::testing
