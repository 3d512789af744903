#pragma once

#include <cstdint>
#include <span>

#include "engine/forward.h"
#include "engine/grouping.h"
#include "kernels/expert_weights.h"
#include "store/expert_store.h"

namespace sluice {

/// An expert whose bytes are ready, and its rows of the running call.
struct ReadyExpert {
  const Grouping::Group* group = nullptr;
  ExpertWeights weights;
};

/// The arithmetic of one call: each expert's rows into scratch [T · K, H], then the combine. On a
/// host device it is done when a call returns; on an accelerator it is enqueued on the call's
/// stream.
///
/// Which path an expert takes depends on its own rows alone, so its bits do not depend on who else
/// is computed with it (law 1).
///
/// Thread safety: one call at a time, on its thread; `workspace_bytes` from anywhere.
class ExpertCompute {
 public:
  virtual ~ExpertCompute() = default;

  /// Groups the call's rows and sizes the scratch. Everything named must outlive the call.
  /// Errors: ConfigError when the activations are narrower than the stored weights.
  [[nodiscard]] virtual const Grouping& begin(const ForwardArgs& args, const StoredLayer& layer,
                                              const LayerSpec& spec) = 0;
  /// Whether experts like this one are given to `several` together, or each to `one`.
  [[nodiscard]] virtual bool takes_several(const Grouping::Group& group) const = 0;
  virtual void several(std::span<const ReadyExpert> experts) = 0;
  /// Errors: InternalError with the code of the GEMM or of a callback; what a callback throws.
  virtual void one(const ReadyExpert& expert) = 0;
  /// Writes `out`, in k order.
  virtual void combine_rows() = 0;
  /// Gives the scratch back. No call follows.
  virtual void close() noexcept = 0;

  [[nodiscard]] virtual std::int64_t generic_gate_calls() const = 0;
  [[nodiscard]] virtual std::uint64_t workspace_bytes() const = 0;
};

/// Calls `callback`, `what` in the report, on the rows of an expert.
/// Errors: InternalError with its code; what it throws.
void call_back(const ExpertCallback& callback, const char* what, const ForwardArgs& args,
               const StoredLayer& layer, std::int64_t rows, std::int64_t in_columns,
               std::int64_t out_columns, const void* in, void* out);

}  // namespace sluice
