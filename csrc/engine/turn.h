#pragma once

#include <chrono>
#include <functional>
#include <string>
#include <thread>

#include "base/error.h"
#include "base/mutex.h"

namespace sluice {

/// One caller at a time, without holding a lock while it works: callbacks of a call may ask for
/// statistics, and a thread that would wait for its own turn is told so.
///
/// Thread safety: all members.
class Turn {
 public:
  /// Blocks until the turn is free; asks `interrupted` every 50 ms.
  /// Errors: Error when this thread has the turn; Interrupted.
  void take(const char* verb, const std::function<bool()>& interrupted) EXCLUDES(mu_) {
    constexpr std::chrono::milliseconds kSlice{50};
    auto asked_at = std::chrono::steady_clock::now();
    while (!take_within(verb, kSlice)) {
      // Woken but late: another thread was faster. Asking costs the GIL, so not each time.
      const auto now = std::chrono::steady_clock::now();
      if (!interrupted || now - asked_at < kSlice) continue;
      asked_at = now;
      if (interrupted()) {
        throw Interrupted(std::string(verb) + ": interrupted while another call runs");
      }
    }
  }
  /// Whether the calling thread has the turn.
  [[nodiscard]] bool is_mine() EXCLUDES(mu_) {
    const MutexLock lock(mu_);
    return owner_ == std::this_thread::get_id();
  }
  void give() EXCLUDES(mu_) {
    const MutexLock lock(mu_);
    owner_ = {};
    free_.notify_one();
  }

 private:
  bool take_within(const char* verb, std::chrono::nanoseconds slice) EXCLUDES(mu_) {
    const MutexLock lock(mu_);
    require<Error>(owner_ != std::this_thread::get_id(), [&] {
      return std::string(verb) +
             ": called from inside a forward of the same session, expected a call outside of its "
             "callbacks";
    });
    if (owner_ != std::thread::id{}) free_.wait_for(mu_, slice);
    if (owner_ != std::thread::id{}) return false;
    owner_ = std::this_thread::get_id();
    return true;
  }

  Mutex mu_;
  CondVar free_;
  std::thread::id owner_ GUARDED_BY(mu_);
};

/// Holds the turn for a scope.
class TurnGuard {
 public:
  TurnGuard(Turn& turn, const char* verb, const std::function<bool()>& interrupted) : turn_(turn) {
    turn_.take(verb, interrupted);
  }
  ~TurnGuard() { turn_.give(); }
  TurnGuard(const TurnGuard&) = delete;
  TurnGuard& operator=(const TurnGuard&) = delete;

 private:
  Turn& turn_;
};

}  // namespace sluice
