#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "cache/policies.h"

namespace sluice {
namespace {

// S3-FIFO (Yang et al., SOSP'23). Newcomers enter a small queue of a tenth of the slots. At its
// head, one that was used more than once since moves to the main queue; the others leave, and
// their ids are remembered, as many as there are slots: who of them comes back enters the main
// queue. The main queue's head goes round again once per use, of which at most three count.
// An expert that may not leave now (leased, loading) is passed over where it stands.
class S3FifoPolicy final : public Policy {
 public:
  explicit S3FifoPolicy(PolicyShape shape)
      : small_limit_(std::max(1, shape.num_slots / 10)),
        num_slots_(static_cast<std::size_t>(shape.num_slots)),
        experts_(shape, Expert{}) {
    for (std::vector<ExpertKey>* const queue : {&small_, &main_, &ghosts_}) {
      queue->reserve(num_slots_);
    }
  }

  void on_event(const CacheEvent& event) override {
    for (const ExpertIdx expert : event.experts) {
      Expert& each = experts_[{event.layer, expert}];
      if (each.queue != Queue::kNone) each.uses = std::min(each.uses + 1, kMostUses);
    }
  }

  void on_load(ExpertKey key, bool /*guessed*/) override {
    Expert& each = experts_[key];
    const bool known = each.remembered;
    if (known) forget(key);
    each.uses = 0;
    put(key, known ? Queue::kMain : Queue::kSmall);
  }

  void on_evict(ExpertKey key) override {
    const Queue from = experts_[key].queue;
    take_out(key);
    if (from == Queue::kSmall) remember(key);
  }

  [[nodiscard]] std::size_t victim(std::span<const Candidate> candidates) override {
    for (std::size_t i = 0; i < candidates.size(); ++i) {
      experts_[candidates[i].key].candidate = static_cast<std::int32_t>(i);
    }
    const ExpertKey chosen = choose();
    const auto idx = static_cast<std::size_t>(experts_[chosen].candidate);
    for (const Candidate& each : candidates) experts_[each.key].candidate = -1;
    return idx;
  }

 private:
  enum class Queue : std::uint8_t { kNone, kSmall, kMain };
  static constexpr int kMostUses = 3;
  struct Expert {
    Queue queue = Queue::kNone;
    int uses = 0;  // since it came
    bool remembered = false;
    std::int32_t candidate = -1;
  };

  // Ends: every turn moves a candidate to the main queue, or takes a use from one.
  [[nodiscard]] ExpertKey choose() {
    for (;;) {
      const auto small = first_candidate(small_);
      const auto main = first_candidate(main_);
      const bool from_small =
          small != small_.end() &&
          (std::cmp_greater_equal(small_.size(), small_limit_) || main == main_.end());
      const ExpertKey key = from_small ? *small : *main;
      Expert& each = experts_[key];
      if (from_small) {
        if (each.uses <= 1) return key;
        take_out(key);
        each.uses = 0;
        put(key, Queue::kMain);
      } else {
        if (each.uses == 0) return key;
        --each.uses;
        take_out(key);
        put(key, Queue::kMain);
      }
    }
  }
  [[nodiscard]] std::vector<ExpertKey>::iterator first_candidate(std::vector<ExpertKey>& queue) {
    return std::find_if(queue.begin(), queue.end(),
                        [&](ExpertKey key) { return experts_[key].candidate >= 0; });
  }
  void put(ExpertKey key, Queue queue) {
    experts_[key].queue = queue;
    (queue == Queue::kSmall ? small_ : main_).push_back(key);
  }
  void take_out(ExpertKey key) {
    Expert& each = experts_[key];
    if (each.queue == Queue::kNone) return;
    std::vector<ExpertKey>& queue = each.queue == Queue::kSmall ? small_ : main_;
    queue.erase(std::find(queue.begin(), queue.end(), key));
    each.queue = Queue::kNone;
  }
  void remember(ExpertKey key) {
    if (ghosts_.size() == num_slots_) {
      experts_[ghosts_.front()].remembered = false;
      ghosts_.erase(ghosts_.begin());
    }
    ghosts_.push_back(key);
    experts_[key].remembered = true;
  }
  void forget(ExpertKey key) {
    experts_[key].remembered = false;
    ghosts_.erase(std::find(ghosts_.begin(), ghosts_.end(), key));
  }

  std::int32_t small_limit_;
  std::size_t num_slots_;
  PerExpert<Expert> experts_;
  // First in first; short enough to be searched, and never larger than the slots.
  std::vector<ExpertKey> small_;
  std::vector<ExpertKey> main_;
  std::vector<ExpertKey> ghosts_;
};

}  // namespace

std::unique_ptr<Policy> make_s3_fifo_policy(PolicyShape shape) {
  return std::make_unique<S3FifoPolicy>(shape);
}

}  // namespace sluice
