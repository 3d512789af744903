#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "base/clock.h"
#include "engine/stats.h"
#include "simulate/link_model.h"
#include "simulate/routes.h"

namespace sluice {

/// A machine and a model, as far as time is concerned.
struct TimedSettings {
  std::uint64_t expert_bytes = 0;
  std::uint64_t chunk_bytes = 0;  ///< largest single copy
  LinkRates link;
  double dense_seconds = 0;    ///< of a layer, before its experts
  double expert_seconds = 0;   ///< of one expert that is there
  std::int32_t num_slots = 0;  ///< of all layers together, as in a session
  std::string policy = "decayed-lfu";
};

/// Guesses by event: those of event i are given once its own demands are on their way.
struct GuessTable {
  std::span<const std::int64_t> begins;  ///< `[M + 1]`, or empty: none
  std::span<const std::int32_t> layers;
  std::span<const std::int32_t> experts;
  std::span<const float> probabilities;
  std::span<const std::int32_t> steps_ahead;  ///< 0: later in the event's own step
};

struct TimedResult {
  EngineStats stats;             ///< bytes are those of the model that the run stands for
  std::vector<Nanos> step_ends;  ///< of each distinct step
  /// Per event, sums from the start: demand bytes, wasted bytes.
  std::vector<std::uint64_t> demand_bytes;
  std::vector<std::uint64_t> wasted_bytes;
};

/// Runs routes through a session's own engine on a virtual clock: hits, late hits, misses and waits
/// are the product's. Only arithmetic and bytes are missing: computing and copying take the time
/// that the settings say. A step's events follow each other at once; the next step begins when the
/// last has ended.
///
/// `rows` (empty, or `[M, max_experts]`): keep-scores of each event's own layer, published with its
/// guesses.
///
/// A guess for a layer's next visit is worthless when that begins; until the first step has shown
/// how long events take, guesses have no deadline.
///
/// Errors: ConfigError on what does not fit; CapacityError below one slot.
[[nodiscard]] TimedResult run_timed(const Routes& routes, const TimedSettings& settings,
                                    const GuessTable& guesses, std::span<const float> rows);

}  // namespace sluice
