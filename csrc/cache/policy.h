#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/ids.h"

namespace sluice {

/// One layer of one step, as the cache sees it: the distinct experts that were asked for.
struct CacheEvent {
  std::int64_t step = 0;  ///< counts forwards of layer 0 (or whatever layer runs first)
  LayerIdx layer{};
  std::span<const ExpertIdx> experts;  ///< in the order in which they count as used
  std::span<const float> weights{};    ///< of the router, beside `experts`, where they are known
  /// Of a prompt, whose every token is a step of its own: how many of them asked for each of
  /// `experts`, of `num_tokens`. Empty: one step, whatever its batch.
  std::span<const std::int64_t> tokens{};
  std::int64_t num_tokens = 1;
};

/// Keep-scores of whole layers, as a predictor publishes them: who is larger should stay.
struct ForecastRows {
  std::int64_t step = 0;  ///< the step that they were made at
  LayerIdx first_layer{};
  /// `[layers, max_experts]` of the policy's shape, from `first_layer` on.
  std::span<const float> scores;
};

/// An idle resident that may be evicted.
struct Candidate {
  SlotIdx slot{};
  ExpertKey key{};
};

/// Who leaves the cache. A policy sees events and residency, and returns choices; it moves nothing.
/// Deterministic: the same calls give the same choices.
///
/// Thread safety: none; the cache calls it under its lock.
class Policy {
 public:
  virtual ~Policy() = default;
  virtual void on_event(const CacheEvent& event) = 0;
  /// `key` was given a slot: when its load begins, so that choices do not depend on landings.
  /// `guessed`: by a hint, for the next event of its layer or a later one.
  virtual void on_load(ExpertKey key, bool guessed) {
    (void)key;
    (void)guessed;
  }
  /// `key` lost its slot: evicted, or its load failed or was cancelled.
  virtual void on_evict(ExpertKey key) { (void)key; }
  /// What a predictor expects. Most policies ignore it.
  virtual void on_forecast(const ForecastRows& rows) { (void)rows; }
  /// Which of `candidates` (never empty, in slot order) leaves: its index.
  [[nodiscard]] virtual std::size_t victim(std::span<const Candidate> candidates) = 0;
  /// Whether a hint for `incoming` may push `victim` out. Demands are never asked.
  [[nodiscard]] virtual bool admits_hint(ExpertKey incoming, ExpertKey victim) {
    (void)incoming;
    (void)victim;
    return true;
  }
  /// What becomes of a hint that is not admitted: it waits for a slot, and with it all that are due
  /// later; or (false) it is dropped.
  [[nodiscard]] virtual bool hints_wait() const { return false; }
};

/// How many layers and experts a policy keeps statistics for, and of how many slots it decides.
struct PolicyShape {
  std::int32_t num_layers = 0;
  std::int32_t max_experts = 0;  ///< of any layer
  std::int32_t num_slots = 1;
  std::int32_t layers_served = 0;  ///< layers that share these slots; 0: all
};

/// The policies of this build:
/// - "lru", "fifo", "lfu": least recently used, first in, least often used;
/// - "decayed-lfu": uses that halve every 16 steps ("decayed-lfu:8": every 8);
/// - "lfru": uses / (steps since the last one + 1) (2608.07911);
/// - "s3-fifo": a small queue on trial, a main one, and ids of who left early (SOSP'23);
/// - "least-stale": who the running step has not touched leaves first (2602.03921);
/// - "static": the first experts to arrive stay; hints never displace them;
/// - "edge", "edge:printed": EdgeMoE's frequency over distance, our reading and the printed one
///   (2308.14352 §III-C2);
/// - "plec": whose predicted turn is farthest leaves, unpredicted ones first (ExpertFlow
///   2410.17954 §3.4); predictions are forecast rows, where a score above 0 predicts a use;
/// - "forecast": the smallest keep-score leaves, as long as that does no worse than "decayed-lfu"
///   (policy_forecast.cc); "forecast:always": whatever it does, as bounds and simulations want it.
/// Errors: ConfigError naming them.
[[nodiscard]] std::unique_ptr<Policy> make_policy(std::string_view name, PolicyShape shape);
[[nodiscard]] std::vector<std::string> policy_names();

}  // namespace sluice
