#include <cstdint>

#include "cache/policies.h"

namespace sluice {
namespace {

// Who came first stays. A demand needs a slot all the same, so the last to come leaves for it: all
// slots but those that change hands within a layer keep their first expert.
class StaticPolicy final : public Policy {
 public:
  explicit StaticPolicy(PolicyShape shape) : arrival_(shape, 0) {}

  void on_event(const CacheEvent& /*event*/) override {}
  void on_load(ExpertKey key, bool /*guessed*/) override { arrival_[key] = ++clock_; }

  [[nodiscard]] std::size_t victim(std::span<const Candidate> candidates) override {
    return least_kept(candidates,
                      [&](ExpertKey key) { return -static_cast<std::int64_t>(arrival_[key]); });
  }

  [[nodiscard]] bool admits_hint(ExpertKey /*incoming*/, ExpertKey /*victim*/) override {
    return false;
  }

 private:
  PerExpert<std::uint64_t> arrival_;
  std::uint64_t clock_ = 0;
};

}  // namespace

std::unique_ptr<Policy> make_static_policy(PolicyShape shape) {
  return std::make_unique<StaticPolicy>(shape);
}

}  // namespace sluice
