#include <cstdint>

#include "cache/policies.h"

namespace sluice {
namespace {

// Who came first leaves first, however often it was used.
class FifoPolicy final : public Policy {
 public:
  explicit FifoPolicy(PolicyShape shape) : arrival_(shape, 0) {}

  void on_event(const CacheEvent& /*event*/) override {}
  void on_load(ExpertKey key, bool /*guessed*/) override { arrival_[key] = ++clock_; }

  [[nodiscard]] std::size_t victim(std::span<const Candidate> candidates) override {
    return least_kept(candidates, [&](ExpertKey key) { return arrival_[key]; });
  }

 private:
  PerExpert<std::uint64_t> arrival_;
  std::uint64_t clock_ = 0;
};

}  // namespace

std::unique_ptr<Policy> make_fifo_policy(PolicyShape shape) {
  return std::make_unique<FifoPolicy>(shape);
}

}  // namespace sluice
