#include <cmath>
#include <limits>

#include "cache/policies.h"

namespace sluice {
namespace {

// An expert's count f halves every h steps and grows by one per use. All counts shrink by the same
// factor, so they are kept as log2 f + step / h, which does not change while time passes: a victim
// is found by comparing, and equal histories compare equal, bit by bit.
class DecayedLfuPolicy final : public Policy {
 public:
  DecayedLfuPolicy(PolicyShape shape, double half_life)
      : half_life_(half_life), log_count_(shape, -std::numeric_limits<double>::infinity()) {}

  void on_event(const CacheEvent& event) override {
    now_ = static_cast<double>(event.step) / half_life_;
    for (std::size_t i = 0; i < event.experts.size(); ++i) {
      double& log_count = log_count_[{event.layer, event.experts[i]}];
      log_count = used_more(log_count, event.tokens.empty() ? 1.0 : uses(event, i));
    }
  }

  [[nodiscard]] std::size_t victim(std::span<const Candidate> candidates,
                                   ExpertKey /*incoming*/) override {
    return least_kept(candidates, [&](ExpertKey key) { return log_count_[key]; });
  }

  // A hint is worth what its expert would count if the hint came true now.
  [[nodiscard]] bool admits_hint(ExpertKey incoming, ExpertKey victim) override {
    return used_once_more(log_count_[incoming]) > log_count_[victim];
  }

 private:
  [[nodiscard]] double used_more(double log_count, double uses) const {
    return std::log2(std::exp2(log_count - now_) + uses) + now_;
  }
  [[nodiscard]] double used_once_more(double log_count) const { return used_more(log_count, 1.0); }
  // What as many steps as the prompt has tokens leave of their uses, had they come evenly: the
  // share of tokens times 1 + 2^(-1/h) + 2^(-2/h) + …
  [[nodiscard]] double uses(const CacheEvent& event, std::size_t idx) const {
    const auto steps = static_cast<double>(event.num_tokens);
    return static_cast<double>(event.tokens[idx]) / steps * (1.0 - std::exp2(-steps / half_life_)) /
           (1.0 - std::exp2(-1.0 / half_life_));
  }

  double half_life_;
  double now_ = 0;  // the current step, in half-lives
  PerExpert<double> log_count_;
};

}  // namespace

std::unique_ptr<Policy> make_decayed_lfu_policy(PolicyShape shape, double half_life) {
  return std::make_unique<DecayedLfuPolicy>(shape, half_life);
}

}  // namespace sluice
