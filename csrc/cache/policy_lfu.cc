#include <cstdint>

#include "cache/policies.h"

namespace sluice {
namespace {

// Who was asked for in the fewest events leaves first. Nothing is ever forgotten.
class LfuPolicy final : public Policy {
 public:
  explicit LfuPolicy(PolicyShape shape) : uses_(shape, 0), guessed_(shape) {}

  void on_event(const CacheEvent& event) override {
    for (const ExpertIdx expert : event.experts) ++uses_[{event.layer, expert}];
    guessed_.on_event(event);
  }
  void on_load(ExpertKey key, bool guessed) override { guessed_.on_load(key, guessed); }

  [[nodiscard]] std::size_t victim(std::span<const Candidate> candidates) override {
    return least_kept(candidates, [&](ExpertKey key) { return worth(key); });
  }

  // A hint is worth what its expert would count if the hint came true.
  [[nodiscard]] bool admits_hint(ExpertKey incoming, ExpertKey victim) override {
    return uses_[incoming] + 1 > worth(victim);
  }

 private:
  [[nodiscard]] std::int64_t worth(ExpertKey key) const {
    return uses_[key] + (guessed_[key] ? 1 : 0);
  }

  PerExpert<std::int64_t> uses_;
  Guessed guessed_;
};

}  // namespace

std::unique_ptr<Policy> make_lfu_policy(PolicyShape shape) {
  return std::make_unique<LfuPolicy>(shape);
}

}  // namespace sluice
