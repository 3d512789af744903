#pragma once

#include <atomic>
#include <chrono>
#include <mutex>
#include <optional>

namespace sluice {

/// What a test's scheduler may do in place of the waits of Mutex and CondVar.
///
/// The emulated CUDA runtime lets one host thread run at a time, the next one chosen by seed, so
/// that a test repeats its interleaving; for that it must know who waits and for what. The product
/// never sets hooks.
///
/// Thread safety: any thread, in place of the call named.
class WaitHooks {
 public:
  virtual void lock(std::mutex& mutex) = 0;
  virtual void unlock(std::mutex& mutex) = 0;
  /// Gives `mutex` back, waits for a notification of `condition`, at most about `timeout`, and
  /// takes the mutex again. May return early, as every condition variable may.
  virtual void wait(const void* condition, std::mutex& mutex,
                    std::optional<std::chrono::nanoseconds> timeout) = 0;
  /// One or all of those that wait for `condition`. noexcept, as notifying is.
  virtual void notify(const void* condition, bool all) noexcept = 0;

 protected:
  ~WaitHooks() = default;
};

/// Set and taken away while no other thread waits or holds a Mutex. Null: nothing is replaced.
inline constinit std::atomic<WaitHooks*> wait_hooks = nullptr;

}  // namespace sluice
