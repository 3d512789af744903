#include <cstdint>

#include "cache/policies.h"

namespace sluice {
namespace {

// Stamps count touches: one per expert of an event, in the event's order, and one per expert that
// came without being asked for (a hint counts as used when it got its slot).
class LruPolicy final : public Policy {
 public:
  explicit LruPolicy(PolicyShape shape) : last_touch_(shape, 0) {}

  void on_event(const CacheEvent& event) override {
    event_begin_ = clock_ + 1;
    for (const ExpertIdx expert : event.experts) last_touch_[{event.layer, expert}] = ++clock_;
  }

  void on_load(ExpertKey key, bool /*guessed*/) override {
    std::uint64_t& touch = last_touch_[key];
    if (touch < event_begin_ || touch == 0) touch = ++clock_;
  }

  [[nodiscard]] std::size_t victim(std::span<const Candidate> candidates) override {
    return least_kept(candidates, [&](ExpertKey key) { return last_touch_[key]; });
  }

 private:
  PerExpert<std::uint64_t> last_touch_;
  std::uint64_t clock_ = 0;
  std::uint64_t event_begin_ = 0;
};

}  // namespace

std::unique_ptr<Policy> make_lru_policy(PolicyShape shape) {
  return std::make_unique<LruPolicy>(shape);
}

}  // namespace sluice
