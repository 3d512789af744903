#include <cstdint>
#include <tuple>

#include "cache/policies.h"

namespace sluice {
namespace {

// Experts that the running step has touched are fresh; the others are stale and leave first, the
// least recently touched of them (2602.03921). Where all are fresh, the one whose layer is due
// last leaves. A load counts as a touch: who was just brought for a coming layer is fresh.
class LeastStalePolicy final : public Policy {
 public:
  explicit LeastStalePolicy(PolicyShape shape)
      : num_layers_(shape.num_layers), touches_(shape, Touch{}) {}

  void on_event(const CacheEvent& event) override {
    step_ = event.step;
    layer_ = to_int(event.layer);
    event_begin_ = clock_ + 1;
    for (const ExpertIdx expert : event.experts) {
      touches_[{event.layer, expert}] = {.at = ++clock_, .step = step_};
    }
  }

  void on_load(ExpertKey key, bool /*guessed*/) override {
    Touch& touch = touches_[key];
    if (touch.at < event_begin_ || touch.at == 0) touch = {.at = ++clock_, .step = step_};
  }

  [[nodiscard]] std::size_t victim(std::span<const Candidate> candidates) override {
    return least_kept(candidates, [&](ExpertKey key) { return keep_order(key); });
  }

 private:
  struct Touch {
    std::uint64_t at = 0;
    std::int64_t step = -1;
  };
  // Fresh or not, then (of fresh ones) how soon the layer's turn is, then the last touch.
  [[nodiscard]] std::tuple<bool, std::int32_t, std::uint64_t> keep_order(ExpertKey key) const {
    const Touch& touch = touches_[key];
    const bool fresh = touch.at != 0 && touch.step == step_;
    const std::int32_t until =
        ((to_int(key.layer) - layer_ - 1) % num_layers_ + num_layers_) % num_layers_;
    return {fresh, fresh ? -until : 0, touch.at};
  }

  std::int32_t num_layers_;
  std::int64_t step_ = -1;
  std::int32_t layer_ = 0;
  std::uint64_t clock_ = 0;
  std::uint64_t event_begin_ = 0;
  PerExpert<Touch> touches_;
};

}  // namespace

std::unique_ptr<Policy> make_least_stale_policy(PolicyShape shape) {
  return std::make_unique<LeastStalePolicy>(shape);
}

}  // namespace sluice
