#include <algorithm>
#include <limits>

#include "base/error.h"
#include "kernels/plan_checks.h"
#include "kernels/route.h"

namespace sluice {
namespace {

constexpr std::int64_t kMostWarps = 32;
// Turns of 32 entries that are worth a warp of their own, against the columns of counters that each
// further warp adds to the sums between counting and placing.
constexpr std::int64_t kTurnsPerWarp = 2;
constexpr std::int64_t kMostEntries = std::int64_t{1} << 30;

}  // namespace

RoutePlan plan_route(const RouteProblem& problem) {
  require<ConfigError>(problem.num_tokens >= 0 && problem.top_k >= 1 &&
                           problem.num_tokens <= kMostEntries / problem.top_k,
                       [&] {
                         return "route: got " + std::to_string(problem.num_tokens) + " tokens of " +
                                std::to_string(problem.top_k) +
                                " experts, expected at most 2^30 entries; cut the batch";
                       });
  require<ConfigError>(problem.num_experts >= 1 && problem.num_experts <= kMostEntries, [&] {
    return "route: got " + std::to_string(problem.num_experts) + " experts, expected 1 to 2^30";
  });
  RoutePlan plan;
  const std::int64_t turns =
      std::max<std::int64_t>(1, ceil_div(problem.num_tokens * problem.top_k, 32));
  const std::int64_t warps =
      std::clamp<std::int64_t>(ceil_div(turns, kTurnsPerWarp), 1, kMostWarps);
  plan.warps = static_cast<int>(warps);
  plan.entries_per_warp = static_cast<int>(ceil_div(turns, warps) * 32);
  plan.passes = static_cast<int>(ceil_div(problem.num_experts, kRouteExpertsPerPass));
  const int keys = std::min(problem.num_experts, kRouteExpertsPerPass);
  plan.key_bits = 1;
  while ((1 << plan.key_bits) < keys) ++plan.key_bits;
  return plan;
}

std::string RoutePlan::text() const {
  return std::to_string(warps) + " warps of " + std::to_string(entries_per_warp) + " entries, " +
         std::to_string(passes) + " passes, " + std::to_string(key_bits) + " key bits";
}

}  // namespace sluice
