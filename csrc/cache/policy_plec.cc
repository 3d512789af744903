#include <cstdint>
#include <limits>
#include <tuple>

#include "cache/policies.h"

namespace sluice {
namespace {

// ExpertFlow's predictive locality-aware cache (2410.17954 §3.4), the part that says who leaves:
// the resident whose predicted turn is farthest, unpredicted ones (never) first, then the one that
// came first. A layer that has run is behind: its experts are predicted no more until the next
// forecast, so that their slots take what comes in execution order, and what a true route did not
// want leaves before anything that is still due.
class PlecPolicy final : public Policy {
 public:
  explicit PlecPolicy(PolicyShape shape) : shape_(shape), expected_(shape, 0), arrival_(shape, 0) {}

  void on_event(const CacheEvent& event) override {
    layer_ = to_int(event.layer);
    for (char& each : expected_.layer(event.layer)) each = 0;
  }

  void on_forecast(const ForecastRows& rows) override {
    const auto width = static_cast<std::size_t>(shape_.max_experts);
    for (std::size_t i = 0; i < rows.scores.size(); ++i) {
      const std::int32_t layer = to_int(rows.first_layer) + static_cast<std::int32_t>(i / width);
      expected_[make_key(layer, static_cast<std::int32_t>(i % width))] = rows.scores[i] > 0.0F;
    }
  }

  void on_load(ExpertKey key, bool /*guessed*/) override { arrival_[key] = ++clock_; }

  [[nodiscard]] std::size_t victim(std::span<const Candidate> candidates) override {
    return least_kept(candidates, [&](ExpertKey key) {
      return std::tuple(-distance(key), static_cast<std::int64_t>(arrival_[key]));
    });
  }

  // A guess may take the slot of who is due later than its own expert, or never.
  [[nodiscard]] bool admits_hint(ExpertKey incoming, ExpertKey victim) override {
    return turn(incoming) < distance(victim);
  }
  // The plan's next expert takes the slot of the first one that has run.
  [[nodiscard]] bool hints_wait() const override { return true; }

 private:
  static constexpr std::int32_t kNotExpected = std::numeric_limits<std::int32_t>::max();

  // Layers until the expert's layer runs: 1 is the next one, S the one that has just run.
  [[nodiscard]] std::int32_t turn(ExpertKey key) const {
    const std::int32_t layers = shape_.num_layers;
    return ((to_int(key.layer) - layer_ - 1) % layers + layers) % layers + 1;
  }
  [[nodiscard]] std::int32_t distance(ExpertKey key) const {
    return expected_[key] != 0 ? turn(key) : kNotExpected;
  }

  PolicyShape shape_;
  std::int32_t layer_ = -1;
  PerExpert<char> expected_;
  PerExpert<std::uint64_t> arrival_;
  std::uint64_t clock_ = 0;
};

}  // namespace

std::unique_ptr<Policy> make_plec_policy(PolicyShape shape) {
  return std::make_unique<PlecPolicy>(shape);
}

}  // namespace sluice
