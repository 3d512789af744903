#include <cstdint>

#include "cache/policies.h"

namespace sluice {
namespace {

// Frequency over recency (2608.07911): uses / (steps since the last one + 1).
class LfruPolicy final : public Policy {
 public:
  explicit LfruPolicy(PolicyShape shape) : uses_(shape, Uses{}), guessed_(shape) {}

  void on_event(const CacheEvent& event) override {
    step_ = event.step;
    for (const ExpertIdx expert : event.experts) {
      Uses& uses = uses_[{event.layer, expert}];
      ++uses.count;
      uses.last_step = step_;
    }
    guessed_.on_event(event);
  }
  void on_load(ExpertKey key, bool guessed) override { guessed_.on_load(key, guessed); }

  [[nodiscard]] std::size_t victim(std::span<const Candidate> candidates) override {
    return least_kept(candidates, [&](ExpertKey key) { return worth(key); });
  }

  // A hint is worth what its expert would be worth if the hint came true now.
  [[nodiscard]] bool admits_hint(ExpertKey incoming, ExpertKey victim) override {
    return if_used(incoming) > worth(victim);
  }

 private:
  struct Uses {
    std::int64_t count = 0;
    std::int64_t last_step = 0;
  };
  [[nodiscard]] double worth(ExpertKey key) const {
    return guessed_[key] ? if_used(key) : keep_score(uses_[key]);
  }
  [[nodiscard]] double if_used(ExpertKey key) const {
    return keep_score({.count = uses_[key].count + 1, .last_step = step_});
  }
  [[nodiscard]] double keep_score(const Uses& uses) const {
    return static_cast<double>(uses.count) / static_cast<double>(step_ - uses.last_step + 1);
  }

  std::int64_t step_ = 0;
  PerExpert<Uses> uses_;
  Guessed guessed_;
};

}  // namespace

std::unique_ptr<Policy> make_lfru_policy(PolicyShape shape) {
  return std::make_unique<LfruPolicy>(shape);
}

}  // namespace sluice
