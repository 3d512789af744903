#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <limits>

namespace sluice {

/// Nanoseconds of some clock; only differences and order mean anything.
using Nanos = std::int64_t;
/// "Never": no wake-up is due, a hint has no deadline.
inline constexpr Nanos kNever = std::numeric_limits<Nanos>::max();

/// Where time comes from. The transfer engine takes `now` as an argument; only drivers own a clock.
class Clock {
 public:
  virtual ~Clock() = default;
  [[nodiscard]] virtual Nanos now() const = 0;
};

/// The machine's monotonic clock.
class SteadyClock final : public Clock {
 public:
  [[nodiscard]] Nanos now() const override {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(
               std::chrono::steady_clock::now().time_since_epoch())
        .count();
  }
};

/// A clock that moves when told to: tests and replay.
class VirtualClock final : public Clock {
 public:
  [[nodiscard]] Nanos now() const override { return now_.load(std::memory_order_relaxed); }
  void advance(Nanos nanos) { now_.fetch_add(nanos, std::memory_order_relaxed); }

 private:
  std::atomic<Nanos> now_{0};
};

}  // namespace sluice
