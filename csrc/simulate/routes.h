#pragma once

#include <cstdint>
#include <span>

namespace sluice {

/// A trace as events in order: M visits of a layer, each with the distinct experts it needs.
struct Routes {
  std::int32_t num_layers = 0;
  std::int32_t max_experts = 0;           ///< of any layer
  std::span<const std::int64_t> steps;    ///< `[M]`, ascending
  std::span<const std::int32_t> layers;   ///< `[M]`, ascending within a step
  std::span<const std::int64_t> begins;   ///< `[M + 1]`: where an event's experts begin below
  std::span<const std::int32_t> experts;  ///< by event, in the order in which they count as used
  std::span<const float> weights;         ///< of the router, beside `experts`; or empty

  [[nodiscard]] std::int64_t num_events() const { return static_cast<std::int64_t>(steps.size()); }
  /// Errors: ConfigError naming the array that does not fit, or the event that lies.
  void check() const;
};

}  // namespace sluice
