#include <cstdint>

#include "cache/policies.h"

namespace sluice {
namespace {

// EdgeMoE's cache (2308.14352 §III-C2): evict what is rarely used and far from its turn. The
// formula as printed counts the layers since an expert's turn; ours counts those until it, as the
// prose of the paper says. Both evict the smallest uses / distance.
class EdgePolicy final : public Policy {
 public:
  EdgePolicy(PolicyShape shape, EdgeFormula formula)
      : num_layers_(shape.num_layers), formula_(formula), uses_(shape, 0), guessed_(shape) {}

  void on_event(const CacheEvent& event) override {
    current_ = to_int(event.layer);
    for (const ExpertIdx expert : event.experts) ++uses_[{event.layer, expert}];
    guessed_.on_event(event);
  }
  void on_load(ExpertKey key, bool guessed) override { guessed_.on_load(key, guessed); }

  [[nodiscard]] std::size_t victim(std::span<const Candidate> candidates) override {
    return least_kept(candidates, [&](ExpertKey key) { return worth(key); });
  }

  // A hint is worth what its expert would be worth if the hint came true.
  [[nodiscard]] bool admits_hint(ExpertKey incoming, ExpertKey victim) override {
    return keep_score(incoming, uses_[incoming] + 1) > worth(victim);
  }

 private:
  [[nodiscard]] double worth(ExpertKey key) const {
    return keep_score(key, uses_[key] + (guessed_[key] ? 1 : 0));
  }
  [[nodiscard]] double keep_score(ExpertKey key, std::int64_t uses) const {
    return static_cast<double>(uses) / distance(to_int(key.layer));
  }

  // In 1 ... S: ours has the next layer at 1 and the current one at S; printed has the layer just
  // left at 1 and, where it would divide by zero, the current one at S.
  [[nodiscard]] std::int32_t distance(std::int32_t layer) const {
    const std::int32_t ahead = formula_ == EdgeFormula::kOurs ? layer - current_ : current_ - layer;
    return ((ahead - 1) % num_layers_ + num_layers_) % num_layers_ + 1;
  }

  std::int32_t num_layers_;
  EdgeFormula formula_;
  std::int32_t current_ = 0;
  PerExpert<std::int64_t> uses_;
  Guessed guessed_;
};

}  // namespace

std::unique_ptr<Policy> make_edge_policy(PolicyShape shape, EdgeFormula formula) {
  return std::make_unique<EdgePolicy>(shape, formula);
}

}  // namespace sluice
