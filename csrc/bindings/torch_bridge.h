#pragma once

#include <memory>

#include "base/parallel.h"
#include "bindings/bridge.h"
#include "kernels/gemm.h"

namespace sluice::bindings {

/// The table that _ops gave, or null. It lives as long as the process.
[[nodiscard]] const SluiceTorchTable* torch_table() noexcept;

/// CPUs that this process may run on.
[[nodiscard]] int affinity_threads();

/// Torch's intra-op pool where _ops is bound, else a pool of the core's own over
/// `affinity_threads`. In a process forked from the one that loaded this module always the latter:
/// OpenMP's threads do not survive a fork, and its pool hangs there.
[[nodiscard]] std::unique_ptr<ParallelFor> make_parallel();

/// Who multiplies now: torch by _ops, else Python's function (under the GIL), else the reference.
enum class GemmRoute { kTorch, kPython, kReference };
[[nodiscard]] GemmRoute gemm_route() noexcept;

/// Multiplies by `route`. Errors: whatever Python raises; InternalError with torch's own words.
void multiply(GemmRoute route, const GemmCall& call);

}  // namespace sluice::bindings
