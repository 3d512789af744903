#include "cache/decayed_counts.h"
#include "cache/policies.h"

namespace sluice {
namespace {

class DecayedLfuPolicy final : public Policy {
 public:
  DecayedLfuPolicy(PolicyShape shape, double half_life)
      : counts_(shape, half_life), guessed_(shape) {}

  void on_event(const CacheEvent& event) override {
    counts_.on_event(event);
    guessed_.on_event(event);
  }
  void on_load(ExpertKey key, bool guessed) override { guessed_.on_load(key, guessed); }

  [[nodiscard]] std::size_t victim(std::span<const Candidate> candidates) override {
    return least_kept(candidates, [&](ExpertKey key) { return worth(key); });
  }

  // A hint is worth what its expert would count if the hint came true now.
  [[nodiscard]] bool admits_hint(ExpertKey incoming, ExpertKey victim) override {
    return counts_.used_once_more(incoming) > worth(victim);
  }

 private:
  [[nodiscard]] double worth(ExpertKey key) const {
    return guessed_[key] ? counts_.used_once_more(key) : counts_[key];
  }

  DecayedCounts counts_;
  Guessed guessed_;
};

}  // namespace

std::unique_ptr<Policy> make_decayed_lfu_policy(PolicyShape shape, double half_life) {
  return std::make_unique<DecayedLfuPolicy>(shape, half_life);
}

}  // namespace sluice
