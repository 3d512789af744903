#pragma once

#include <cstdint>
#include <functional>

#include "base/dtype.h"
#include "base/ids.h"
#include "base/stream.h"
#include "kernels/gate.h"

namespace sluice {

/// Computes on an expert's rows, in the activations' type, on the caller's thread. Returns 0, or a
/// code that ends the forward with InternalError (Python raises the original).
using ExpertCallback =
    std::function<int(LayerIdx layer, DType dtype, std::int64_t rows, std::int64_t in_columns,
                      std::int64_t out_columns, const void* in, void* out)>;

/// What a layer computes beyond its stored matrices.
struct LayerSpec {
  GateSpec gate;
  /// For kGeneric: out[M, I] of in[M, 2I].
  ExpertCallback gate_callback;
  /// After the second GEMM, [M, H] → [M, H]; empty: none (Muse Spark's norm).
  ExpertCallback post_expert_callback;

  [[nodiscard]] bool has_callback() const {
    return gate.kind == GateKind::kGeneric || post_expert_callback != nullptr;
  }
};

/// One call of one MoE layer.
struct ForwardArgs {
  LayerIdx layer{};
  std::int64_t num_tokens = 0;  // T
  std::int64_t top_k = 0;       // K
  DType activations = DType::kF32;
  DType weights_dtype = DType::kF32;         // of the routing weights
  const void* hidden = nullptr;              // [T, H]
  const std::int64_t* expert_ids = nullptr;  // [T, K]; ids ≥ E (or < 0) contribute zero
  const void* weights = nullptr;             // [T, K]
  void* out = nullptr;                       // [T, H]
  StreamHandle stream{};                     // of an accelerator: the caller's current one
};

}  // namespace sluice
