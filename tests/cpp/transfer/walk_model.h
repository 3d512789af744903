#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "base/ids.h"
#include "cache/slot_cache.h"
#include "transfer/transfer_engine.h"

namespace sluice::testing {

/// What each policy promises, written as slowly and plainly as it is said: a keep-score per expert,
/// the smallest leaves. Those that keep queues or read forecasts are held against a reference by
/// the simulator's tests.
class PolicyModel {
 public:
  static constexpr std::array kNames = {"decayed-lfu", "edge", "edge:printed", "fifo",
                                        "lfru",        "lfu",  "lru",          "static"};

  PolicyModel(std::string name, std::int32_t num_layers)
      : name_(std::move(name)), num_layers_(num_layers) {}

  void event(std::int64_t step, LayerIdx layer, const std::vector<ExpertIdx>& experts) {
    now_ = static_cast<double>(step);
    layer_ = layer;
    event_begin_ = clock_ + 1;
    for (auto& [key, uses] : uses_) uses.guessed = uses.guessed && key.layer != layer;
    for (const ExpertIdx expert : experts) {
      Uses& uses = uses_[{layer, expert}];
      uses.touch = ++clock_;
      uses.decayed = decayed(uses) + 1;
      uses.last = now_;
      uses.count += 1;
    }
  }
  void load(ExpertKey key, bool guessed) {
    Uses& uses = uses_[key];
    uses.guessed = guessed;
    uses.arrival = ++arrivals_;
    if (uses.touch == 0 || uses.touch < event_begin_) uses.touch = ++clock_;
  }
  /// What a resident is worth: what a guess brought, a use, until its layer has run.
  [[nodiscard]] double worth(ExpertKey key) { return keep_score(key, uses_[key].guessed ? 1 : 0); }
  /// `extra_uses`: as if the expert had been used that often more, now.
  [[nodiscard]] double keep_score(ExpertKey key, double extra_uses = 0) {
    const Uses& uses = uses_[key];
    if (name_ == "lru") return static_cast<double>(uses.touch);
    if (name_ == "static") return -static_cast<double>(uses.arrival);
    if (name_ == "fifo") return static_cast<double>(uses.arrival);
    if (name_ == "lfu") return uses.count + extra_uses;
    if (name_ == "lfru") {
      return (uses.count + extra_uses) / (extra_uses > 0 ? 1 : now_ - uses.last + 1);
    }
    if (name_ == "decayed-lfu") return decayed(uses) + extra_uses;
    const std::int32_t ahead = to_int(key.layer) - to_int(layer_);
    std::int32_t distance = name_ == "edge" ? ahead : -ahead;
    while (distance <= 0) distance += num_layers_;
    return (uses.count + extra_uses) / distance;
  }
  /// Empty where rounding decides.
  [[nodiscard]] std::optional<bool> admits_hint(ExpertKey incoming, ExpertKey victim) {
    if (name_ == "lru" || name_ == "fifo") return true;
    if (name_ == "static") return false;
    const double gain = keep_score(incoming, 1) - worth(victim);
    if (std::abs(gain) < 1e-9) return std::nullopt;
    return gain > 0;
  }

 private:
  struct Uses {
    std::int64_t touch = 0;
    std::int64_t arrival = 0;
    double decayed = 0;
    double last = 0;
    double count = 0;
    bool guessed = false;
  };
  [[nodiscard]] double decayed(const Uses& uses) const {
    return uses.decayed * std::pow(2.0, (uses.last - now_) / 16.0);
  }

  std::string name_;
  std::int32_t num_layers_;
  std::map<ExpertKey, Uses> uses_;
  std::int64_t clock_ = 0;
  std::int64_t event_begin_ = 0;
  std::int64_t arrivals_ = 0;
  double now_ = 0;
  LayerIdx layer_{};
};

/// A request of the transfer engine as a row of a table.
struct ModelRequest {
  ExpertKey key{};
  Ticket ticket;
  Priority priority = Priority::kDemand;
  double probability = 1;
  Nanos deadline = kNever;
  std::int64_t arrival = 0;
  std::int32_t num_chunks = 0;
  std::int32_t started = 0;
  std::int32_t in_flight = 0;
  bool cancelling = false;
  bool failed = false;
  bool was_hint = false;

  [[nodiscard]] bool is_hint() const { return priority != Priority::kDemand; }
  [[nodiscard]] bool may_start() const { return !cancelling && !failed && started < num_chunks; }
  [[nodiscard]] bool expires(Nanos now) const {
    return may_start() && is_hint() && started == 0 && deadline <= now;
  }
  [[nodiscard]] auto rank() const { return std::tuple(priority, -probability, arrival); }
  /// How it has to end, once nothing of it is in flight.
  [[nodiscard]] std::optional<TicketState> outcome() const {
    if (in_flight > 0) return std::nullopt;
    if (failed) return TicketState::kFailed;
    if (cancelling) return TicketState::kCancelled;
    if (started == num_chunks) return TicketState::kDone;
    return std::nullopt;
  }
  void raise(Priority to, double with_probability, Nanos until) {
    const double rank = to == Priority::kDemand ? 1.0 : with_probability;
    if (to < priority) probability = rank;
    if (to == priority) probability = std::max(probability, rank);
    priority = std::min(priority, to);
    deadline = std::max(deadline, until);
    cancelling = false;
  }
};

}  // namespace sluice::testing
