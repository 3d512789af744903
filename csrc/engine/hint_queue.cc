#include "engine/hint_queue.h"

#include <algorithm>

namespace sluice {

bool is_better(const Hint& a, const Hint& b) {
  if (a.probability != b.probability) return a.probability > b.probability;
  return a.deadline < b.deadline;
}

int HintQueue::push(const Hint& hint) {
  const auto same = std::find_if(hints_.begin(), hints_.end(),
                                 [&](const Hint& waiting) { return waiting.key == hint.key; });
  if (same != hints_.end()) {
    if (!is_better(*same, hint)) *same = hint;
    return 1;
  }
  if (hints_.size() < kCapacity) {
    hints_.push_back(hint);
    return 0;
  }
  const auto worst = std::max_element(hints_.begin(), hints_.end(), is_better);
  if (is_better(hint, *worst)) *worst = hint;
  return 1;
}

std::optional<Hint> HintQueue::pop() {
  if (hints_.empty()) return std::nullopt;
  const auto best = std::min_element(hints_.begin(), hints_.end(), is_better);
  const Hint hint = *best;
  hints_.erase(best);
  return hint;
}

std::int64_t HintQueue::clear() {
  const auto count = static_cast<std::int64_t>(hints_.size());
  hints_.clear();
  return count;
}

}  // namespace sluice
