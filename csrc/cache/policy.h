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
  std::span<const ExpertIdx> experts;  ///< ascending
  /// Of a prompt, whose every token is a step of its own: how many of them asked for each of
  /// `experts`, of `num_tokens`. Empty: one step, whatever its batch.
  std::span<const std::int64_t> tokens{};
  std::int64_t num_tokens = 1;
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
  virtual void on_load(ExpertKey key) { (void)key; }
  /// `key` lost its slot: evicted, or its load failed or was cancelled.
  virtual void on_evict(ExpertKey key) { (void)key; }
  /// Which of `candidates` (never empty, in slot order) leaves for `incoming`: its index.
  [[nodiscard]] virtual std::size_t victim(std::span<const Candidate> candidates,
                                           ExpertKey incoming) = 0;
  /// Whether a hint for `incoming` may push `victim` out. Demands are never asked.
  [[nodiscard]] virtual bool admits_hint(ExpertKey incoming, ExpertKey victim) {
    (void)incoming;
    (void)victim;
    return true;
  }
};

/// How many layers and experts a policy keeps statistics for.
struct PolicyShape {
  std::int32_t num_layers = 0;
  std::int32_t max_experts = 0;  ///< of any layer
};

/// The policies of this build: "lru", "decayed-lfu" ("decayed-lfu:16" sets the half-life in steps),
/// "static" (the first experts to arrive stay; hints never displace them), "edge" and
/// "edge:printed" (EdgeMoE's frequency over distance, our reading and the printed one).
/// Errors: ConfigError naming them.
/// Source: EdgeMoE 2308.14352 §III-C2 for edge.
[[nodiscard]] std::unique_ptr<Policy> make_policy(std::string_view name, PolicyShape shape);
[[nodiscard]] std::vector<std::string> policy_names();

}  // namespace sluice
