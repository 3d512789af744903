#pragma once

#include <cstdint>
#include <vector>

#include "base/clock.h"
#include "base/ids.h"
#include "base/mutex.h"

namespace sluice {

/// What a span of the timeline shows.
enum class SpanKind : std::uint8_t { kForward, kCompute, kStall, kLoadDemand, kLoadHint, kCombine };

struct Span {
  SpanKind kind = SpanKind::kForward;
  Nanos begin = 0;
  Nanos end = 0;
  ExpertKey key{};          ///< expert −1 where a span concerns a whole layer
  std::uint64_t bytes = 0;  ///< loads only
  std::int32_t tokens = 0;
};

/// The newest spans, in a ring of fixed size: recording never allocates and never blocks for long.
///
/// Thread safety: all members.
class Timeline {
 public:
  explicit Timeline(std::size_t capacity = 1 << 16);
  void add(const Span& span) EXCLUDES(mu_);
  /// Oldest first.
  [[nodiscard]] std::vector<Span> snapshot() const EXCLUDES(mu_);

 private:
  mutable Mutex mu_;
  std::vector<Span> ring_ GUARDED_BY(mu_);
  std::int64_t count_ GUARDED_BY(mu_) = 0;
};

}  // namespace sluice
