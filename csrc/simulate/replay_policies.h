#pragma once

#include <memory>

#include "cache/policy.h"
#include "simulate/routes.h"

namespace sluice {

/// Belady's MIN: who is used again latest leaves first. Optimal for experts of one size where an
/// expert may be served without being kept. Knows the future: `routes` are what will be replayed.
[[nodiscard]] std::unique_ptr<Policy> make_belady_policy(const Routes& routes, PolicyShape shape);

/// HybriMoE's cache (2504.05897): scores of the router, averaged over a layer's events with weight
/// 0.25 for the newest; the smallest leaves. Of a trace only the chosen experts' weights are known;
/// without any each chosen one counts 1.
[[nodiscard]] std::unique_ptr<Policy> make_mrs_policy(PolicyShape shape);

}  // namespace sluice
