#pragma once

#include <vector>

#include "engine/model.h"

namespace sluice::testing {

inline ModelShape shape_of(DType dtype, GateKind kind, bool gated, bool bias) {
  ModelShape shape{.dtype = dtype, .gated = gated, .has_bias = bias};
  shape.gate.kind = kind;
  return shape;
}

/// What every engine has to compute, on RAM and on a device: each type, with and without biases and
/// gates, interleaved rows, and a callback in either place.
inline std::vector<ModelShape> varied_shapes() {
  std::vector<ModelShape> all = {
      shape_of(DType::kF32, GateKind::kSilu, true, false),
      shape_of(DType::kBF16, GateKind::kOaiSwiglu, true, true),
      shape_of(DType::kF16, GateKind::kRelu2, false, false),
      shape_of(DType::kBF16, GateKind::kSilu, true, true),
      shape_of(DType::kF32, GateKind::kSilu, true, true),
  };
  all[1].gate.interleaved = true;
  all[3].generic_gate = true;
  all[4].post_callback = true;
  return all;
}

}  // namespace sluice::testing
