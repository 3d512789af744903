#pragma once

#include <cstdint>
#include <vector>

#include "base/clock.h"
#include "base/ids.h"
#include "base/mutex.h"
#include "base/ranges.h"

namespace sluice {

/// What a span of the timeline shows.
enum class SpanKind : std::uint8_t { kForward, kCompute, kStall, kLoadDemand, kLoadHint, kCombine };
/// "load_demand".
[[nodiscard]] const char* span_name(SpanKind kind) noexcept;

struct Span {
  SpanKind kind = SpanKind::kForward;
  Nanos begin = 0;
  Nanos end = 0;
  ExpertKey key{};          ///< expert −1 where a span concerns a whole layer
  std::uint64_t bytes = 0;  ///< loads only
  std::int32_t tokens = 0;
};

/// The newest spans, in a ring of fixed size: recording never allocates and never blocks for long.
/// Beside it spans are shown as they begin and end, where `ranges` is not null, under the names
/// that they have in a Chrome trace: "load demand layer 3 expert 5".
///
/// Thread safety: all members.
class Timeline {
 public:
  explicit Timeline(std::size_t capacity = 1 << 16, Ranges* ranges = nullptr);

  /// Shows a span of the calling thread as long as it lives.
  class Shown {
   public:
    Shown(Timeline& timeline, SpanKind kind, ExpertKey key) : ranges_(timeline.ranges_) {
      if (ranges_ != nullptr) [[unlikely]]
        push(kind, key);
    }
    ~Shown() {
      if (ranges_ != nullptr) [[unlikely]]
        ranges_->pop();
    }
    Shown(const Shown&) = delete;
    Shown& operator=(const Shown&) = delete;

   private:
    void push(SpanKind kind, ExpertKey key);
    Ranges* const ranges_;
  };
  /// Shows a span that ends wherever `hide` is called with what this returns.
  [[nodiscard]] std::uint64_t show(SpanKind kind, ExpertKey key) {
    return ranges_ == nullptr ? 0 : start(kind, key);
  }
  void hide(std::uint64_t shown) {
    if (ranges_ != nullptr) [[unlikely]]
      ranges_->end(shown);
  }

  void add(const Span& span) EXCLUDES(mu_);
  /// Oldest first.
  [[nodiscard]] std::vector<Span> snapshot() const EXCLUDES(mu_);

 private:
  [[nodiscard]] std::uint64_t start(SpanKind kind, ExpertKey key);

  Ranges* const ranges_;
  mutable Mutex mu_;
  std::vector<Span> ring_ GUARDED_BY(mu_);
  std::int64_t count_ GUARDED_BY(mu_) = 0;
};

}  // namespace sluice
