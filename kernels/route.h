#pragma once

#include <cstdint>
#include <string>

#include "base/dtype.h"
#include "base/stream.h"

namespace sluice {

/// Sorting a call's entries by expert.
struct RouteProblem {
  std::int64_t num_tokens = 0;   // T
  std::int64_t top_k = 0;        // K
  std::int32_t num_experts = 0;  // E
  DType weights = DType::kF32;   // of the routing weights
};

/// Experts that one pass over the entries counts and places: 32 warps' counters of them are 32 KiB.
inline constexpr int kRouteExpertsPerPass = 256;

struct RoutePlan {
  int warps = 1;             // of the one block; each owns a contiguous run of entries
  int entries_per_warp = 0;  // a multiple of 32
  int key_bits = 1;          // of an expert's number within its pass
  int passes = 1;
  [[nodiscard]] std::string text() const;
};

/// Errors: ConfigError when T · K or E leaves the kernel's range (2^30).
[[nodiscard]] RoutePlan plan_route(const RouteProblem& problem);

/// Device pointers.
struct RouteArgs {
  const std::int64_t* ids = nullptr;  // [T, K]
  const void* weights = nullptr;      // [T, K]
  std::int32_t* offsets = nullptr;    // [E + 1], written
  std::int32_t* rows = nullptr;       // [T · K], the first offsets[E] are written
};

/// Sorts entries (t, k), numbered t · K + k, by expert: expert e's are rows[offsets[e]] …
/// rows[offsets[e + 1] - 1], ascending. An entry whose id lies outside [0, E), or whose weight is
/// exactly zero, is left out. The order of engine/grouping.h, on the device.
///
/// One block, no host wait, the same result at each run. `overlap_previous`: the work ahead in the
/// stream is a kernel, no event wait between.
/// Errors: DeviceError naming the kernel.
void launch_route(const RouteProblem& problem, const RoutePlan& plan, const RouteArgs& args,
                  StreamHandle stream, bool overlap_previous = false);

}  // namespace sluice
