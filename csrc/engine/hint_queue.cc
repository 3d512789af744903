#include "engine/hint_queue.h"

#include <algorithm>

namespace sluice {
namespace {

bool is_before(const Hint& a, const Hint& b) {
  if (a.deadline != b.deadline) return a.deadline < b.deadline;
  return a.probability > b.probability;
}

}  // namespace

bool is_better(const Hint& a, const Hint& b) {
  if (a.probability != b.probability) return a.probability > b.probability;
  return a.deadline < b.deadline;
}

HintQueue::HintQueue() {
  hints_.reserve(kCapacity);
  taken_.reserve(kCapacity);
  late_.reserve(kCapacity);
}

int HintQueue::push(const Hint& hint) {
  const auto same = std::find_if(hints_.begin(), hints_.end(),
                                 [&](const Hint& waiting) { return waiting.key == hint.key; });
  if (same != hints_.end()) {
    const Hint both{.key = hint.key,
                    .probability = std::max(same->probability, hint.probability),
                    .deadline = std::max(same->deadline, hint.deadline)};
    hints_.erase(same);
    insert(both);
    return 1;
  }
  if (hints_.size() < kCapacity) {
    insert(hint);
    return 0;
  }
  const auto worst = std::max_element(hints_.begin(), hints_.end(), is_better);
  if (is_better(hint, *worst)) {
    hints_.erase(worst);
    insert(hint);
  }
  return 1;
}

void HintQueue::insert(const Hint& hint) {
  hints_.insert(std::upper_bound(hints_.begin(), hints_.end(), hint, is_before), hint);
}

// Moore and Hodgson's rule, with values: of jobs of one length, which sets can all be in time is a
// matroid, so giving up the least valuable at each overrun leaves the best set.
int HintQueue::drop_late(Nanos now, Nanos load_time) {
  const auto more_probable = [&](std::size_t a, std::size_t b) {
    return is_better(hints_[a], hints_[b]);
  };
  taken_.clear();
  late_.assign(hints_.size(), false);
  for (std::size_t i = 0; i < hints_.size() && hints_[i].deadline != kNever; ++i) {
    const auto before = static_cast<Nanos>(taken_.size());
    taken_.push_back(i);
    std::push_heap(taken_.begin(), taken_.end(), more_probable);
    if (now + before * load_time < hints_[i].deadline) continue;
    std::pop_heap(taken_.begin(), taken_.end(), more_probable);
    late_[taken_.back()] = true;
    taken_.pop_back();
  }
  std::size_t kept = 0;
  for (std::size_t i = 0; i < hints_.size(); ++i) {
    if (!late_[i]) hints_[kept++] = hints_[i];
  }
  const auto dropped = static_cast<int>(hints_.size() - kept);
  hints_.resize(kept);
  return dropped;
}

std::int64_t HintQueue::clear() {
  const auto count = static_cast<std::int64_t>(hints_.size());
  hints_.clear();
  return count;
}

}  // namespace sluice
