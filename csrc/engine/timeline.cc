#include "engine/timeline.h"

#include <algorithm>

namespace sluice {

Timeline::Timeline(std::size_t capacity) : ring_(capacity) {}

void Timeline::add(const Span& span) {
  const MutexLock lock(mu_);
  if (ring_.empty()) return;
  ring_[static_cast<std::size_t>(count_) % ring_.size()] = span;
  ++count_;
}

std::vector<Span> Timeline::snapshot() const {
  const MutexLock lock(mu_);
  const auto kept = std::min(static_cast<std::size_t>(count_), ring_.size());
  std::vector<Span> spans;
  spans.reserve(kept);
  for (std::size_t i = static_cast<std::size_t>(count_) - kept;
       i < static_cast<std::size_t>(count_); ++i) {
    spans.push_back(ring_[i % ring_.size()]);
  }
  return spans;
}

}  // namespace sluice
