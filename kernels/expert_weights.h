#pragma once

#include <cstdint>

#include "base/dtype.h"
#include "kernels/gate.h"

// What every kernel over plain expert weights is told of them, on the CPU as on a GPU.

namespace sluice {

/// Where one expert's canonical sections lie. Biases are null where there are none.
struct ExpertWeights {
  const void* w13 = nullptr;   // [2I, H], or [I, H] without a gate
  const void* w2 = nullptr;    // [H, I]
  const float* b13 = nullptr;  // [2I] or [I]
  const float* b2 = nullptr;   // [H]
};

/// The experts of one layer, as far as their arithmetic goes.
struct ExpertProblem {
  DType weights = DType::kBF16;
  DType activations = DType::kBF16;  // what the gate's result is rounded to, once; kF32: not at all
  std::int64_t hidden = 0;           // H
  std::int64_t intermediate = 0;     // I
  GateSpec gate = {};
};

/// Rows of w13: 2I with a gate, else I. A generic gate counts as gated.
[[nodiscard]] constexpr std::int64_t w13_rows(const ExpertProblem& problem) noexcept {
  return (is_gated(problem.gate.kind) ? 2 : 1) * problem.intermediate;
}

}  // namespace sluice
