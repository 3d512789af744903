#pragma once

#include <cstdint>
#include <functional>

#include "base/dtype.h"
#include "base/ids.h"
#include "base/stream.h"
#include "kernels/gate.h"

namespace sluice {

/// What a layer computes beyond its stored matrices.
struct LayerSpec {
  GateSpec gate;
  /// For kGeneric: out[M, I] of in[M, 2I] in the activations' type, on the caller's thread. Returns
  /// 0, or a code that ends the forward with InternalError (Python raises the original).
  std::function<int(LayerIdx layer, DType dtype, std::int64_t rows, std::int64_t in_columns,
                    std::int64_t out_columns, const void* in, void* out)>
      gate_callback;
  /// Same shape of call after the second GEMM, [M, H] → [M, H]; empty: none (Muse Spark's norm).
  decltype(gate_callback) post_expert_callback;
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
