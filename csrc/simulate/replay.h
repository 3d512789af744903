#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "base/ids.h"
#include "cache/policy.h"
#include "simulate/routes.h"

namespace sluice {

/// How routes are replayed through slot caches.
struct ReplaySettings {
  /// One number per layer: each layer has slots of its own. A single one: one pool for all layers.
  std::vector<std::int32_t> slots;
  /// Whether an expert may be served without being kept. Without, an event's experts stay until
  /// the next one wherever the slots hold them all.
  bool bypass = true;
  std::int64_t unscored_events = 0;  ///< the first so many are replayed and not counted
  std::vector<ExpertKey> preloaded;  ///< there from the start, as far as the slots hold them
};

/// Of one layer. Sums to requests.
struct ReplayCounts {
  std::int64_t requests = 0;  ///< per event and distinct expert
  std::int64_t hits = 0;
  std::int64_t first_uses = 0;  ///< misses of an expert that was never here before
  std::int64_t returns = 0;     ///< misses of one that was evicted
};

struct ReplayResult {
  std::vector<ReplayCounts> layers;
  std::vector<std::int32_t> event_hits;  ///< of each event, counted or not
  std::int64_t events = 0;               ///< that were counted
  std::int64_t waves = 0;      ///< rounds through the slots: above `events` where one needs more
  std::int64_t evictions = 0;  ///< also of experts that were only served
};

/// Makes the policy of one cache: of all layers, or of one.
using MakePolicy = std::function<std::unique_ptr<Policy>(PolicyShape shape)>;

/// Replays routes event by event, replacement alone: no hints, no clock, no bytes.
///
/// Event-atomic (2608.07911): an event's hits are judged against the cache as the event finds it,
/// all its misses are served beside the cache, and only then the policy says who stays. The caches
/// are the product's own, with room for one event beside the slots.
///
/// `scores` (empty, or `[M, max_experts]`): the keep-scores of each event's own layer, published
/// when its experts are known.
///
/// Errors: ConfigError on settings or arrays that do not fit.
[[nodiscard]] ReplayResult replay(const Routes& routes, const ReplaySettings& settings,
                                  const MakePolicy& make_policy, std::span<const float> scores);

}  // namespace sluice
