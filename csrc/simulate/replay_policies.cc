#include "simulate/replay_policies.h"

#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "cache/policies.h"

namespace sluice {
namespace {

class BeladyPolicy final : public Policy {
 public:
  BeladyPolicy(const Routes& routes, PolicyShape shape)
      : num_layers_(shape.num_layers), uses_(shape, Uses{}) {
    for (std::size_t i = 0; i < routes.steps.size(); ++i) {
      const auto begin = static_cast<std::size_t>(routes.begins[i]);
      const auto end = static_cast<std::size_t>(routes.begins[i + 1]);
      for (std::size_t j = begin; j < end; ++j) {
        uses_[make_key(routes.layers[i], routes.experts[j])].turns.push_back(
            turn(routes.steps[i], routes.layers[i]));
      }
    }
  }

  void on_event(const CacheEvent& event) override { now_ = turn(event.step, to_int(event.layer)); }

  [[nodiscard]] std::size_t victim(std::span<const Candidate> candidates) override {
    return least_kept(candidates, [&](ExpertKey key) { return -next_use(uses_[key]); });
  }

  [[nodiscard]] bool admits_hint(ExpertKey incoming, ExpertKey victim) override {
    return next_use(uses_[incoming]) < next_use(uses_[victim]);
  }

 private:
  struct Uses {
    std::vector<std::int64_t> turns;
    std::size_t passed = 0;  // turns up to now
  };
  [[nodiscard]] std::int64_t turn(std::int64_t step, std::int32_t layer) const {
    return step * num_layers_ + layer;
  }
  [[nodiscard]] std::int64_t next_use(Uses& uses) const {
    while (uses.passed < uses.turns.size() && uses.turns[uses.passed] <= now_) ++uses.passed;
    return uses.passed == uses.turns.size() ? std::numeric_limits<std::int64_t>::max()
                                            : uses.turns[uses.passed];
  }

  std::int64_t num_layers_;
  std::int64_t now_ = std::numeric_limits<std::int64_t>::min();
  PerExpert<Uses> uses_;
};

class MrsPolicy final : public Policy {
 public:
  explicit MrsPolicy(PolicyShape shape) : scores_(shape, 0.0) {}

  void on_event(const CacheEvent& event) override {
    for (double& score : scores_.layer(event.layer)) score *= 1 - kNewest;
    for (std::size_t i = 0; i < event.experts.size(); ++i) {
      scores_[{event.layer, event.experts[i]}] +=
          kNewest * (event.weights.empty() ? 1.0 : double{event.weights[i]});
    }
  }

  [[nodiscard]] std::size_t victim(std::span<const Candidate> candidates) override {
    return least_kept(candidates, [&](ExpertKey key) { return scores_[key]; });
  }

 private:
  static constexpr double kNewest = 0.25;
  PerExpert<double> scores_;
};

}  // namespace

std::unique_ptr<Policy> make_belady_policy(const Routes& routes, PolicyShape shape) {
  return std::make_unique<BeladyPolicy>(routes, shape);
}

std::unique_ptr<Policy> make_mrs_policy(PolicyShape shape) {
  return std::make_unique<MrsPolicy>(shape);
}

}  // namespace sluice
