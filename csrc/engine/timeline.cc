#include "engine/timeline.h"

#include <algorithm>
#include <array>
#include <cstdio>

namespace sluice {
namespace {

/// "load demand layer 3 expert 5", without an allocation.
class RangeName {
 public:
  RangeName(SpanKind kind, ExpertKey key) {
    const int layer = to_int(key.layer);
    const int expert = to_int(key.expert);
    if (expert < 0) {
      (void)std::snprintf(text_.data(), text_.size(), "%s layer %d", span_name(kind), layer);
    } else {
      (void)std::snprintf(text_.data(), text_.size(), "%s layer %d expert %d", span_name(kind),
                          layer, expert);
    }
    std::replace(text_.begin(), text_.end(), '_', ' ');
  }
  [[nodiscard]] const char* c_str() const noexcept { return text_.data(); }

 private:
  std::array<char, 64> text_{};
};

}  // namespace

const char* span_name(SpanKind kind) noexcept {
  switch (kind) {
    case SpanKind::kForward:
      return "forward";
    case SpanKind::kCompute:
      return "compute";
    case SpanKind::kStall:
      return "stall";
    case SpanKind::kLoadDemand:
      return "load_demand";
    case SpanKind::kLoadHint:
      return "load_hint";
    case SpanKind::kCombine:
      return "combine";
  }
  return "?";
}

Timeline::Timeline(std::size_t capacity, Ranges* ranges) : ranges_(ranges), ring_(capacity) {}

void Timeline::Shown::push(SpanKind kind, ExpertKey key) {
  ranges_->push(RangeName(kind, key).c_str());
}

std::uint64_t Timeline::start(SpanKind kind, ExpertKey key) {
  return ranges_->start(RangeName(kind, key).c_str());
}

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
