#pragma once

#include <cstdint>

#include "base/dtype.h"
#include "base/stream.h"

// The last steps of a layer on a GPU. No plan: one block per row and 1024 columns.

namespace sluice {

struct CombineProblem {
  std::int64_t num_tokens = 0;   // T
  std::int64_t top_k = 0;        // K
  std::int64_t hidden = 0;       // H, a multiple of 8
  std::int32_t num_experts = 0;  // E
  DType weights = DType::kF32;   // of the routing weights
  DType out = DType::kBF16;
};

/// Device pointers, 16-byte aligned but for ids and weights.
struct CombineArgs {
  const std::int64_t* ids = nullptr;  // [T, K]
  const void* weights = nullptr;      // [T, K]
  const float* scratch = nullptr;     // [T · K, H] by entry
  void* out = nullptr;                // [T, H], written
};

/// out[t] = Σ_k weight[t, k] · scratch[t, k], by fused multiply-add in k order in fp32 from zero,
/// one rounding: the bits of `combine` (combine.h) on the same rows. Entries that `launch_route`
/// leaves out contribute nothing, and their rows of scratch are not read.
/// `overlap_previous`: as in expert_gemv.h.
/// Errors: ConfigError when H is no multiple of 8 or a pointer is not aligned; DeviceError naming
/// the kernel.
void launch_combine(const CombineProblem& problem, const CombineArgs& args, StreamHandle stream,
                    bool overlap_previous = false);

struct ScatterProblem {
  std::int64_t first = 0;        // routed position of the first row
  std::int64_t num_rows = 0;     // at most; positions from offsets[E] on are left alone
  std::int64_t hidden = 0;       // H, a multiple of 8
  std::int32_t num_experts = 0;  // E
  DType compact = DType::kBF16;
};
struct ScatterArgs {
  const void* compact = nullptr;          // [T · K, H] by routed position
  const std::int32_t* offsets = nullptr;  // [E + 1]
  const std::int32_t* rows = nullptr;     // [T · K]
  float* scratch = nullptr;               // [T · K, H] by entry, written
};

/// scratch[rows[p]] = compact[p] widened, for p in [first, first + num_rows): what a callback made
/// of the rows of `launch_tile_down_compact`, on its way to `launch_combine`.
/// Errors: as `launch_combine`.
void launch_scatter_rows(const ScatterProblem& problem, const ScatterArgs& args,
                         StreamHandle stream, bool overlap_previous = false);

}  // namespace sluice
