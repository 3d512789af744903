#pragma once

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <optional>

#include "base/wait_hooks.h"

// Lock attributes of clang's thread-safety analysis (-Wthread-safety); nothing elsewhere.
#if defined(__clang__)
#define SLUICE_LOCK_ATTRIBUTE(x) __attribute__((x))
#else
#define SLUICE_LOCK_ATTRIBUTE(x)
#endif
#define CAPABILITY(x) SLUICE_LOCK_ATTRIBUTE(capability(x))
#define SCOPED_CAPABILITY SLUICE_LOCK_ATTRIBUTE(scoped_lockable)
#define GUARDED_BY(x) SLUICE_LOCK_ATTRIBUTE(guarded_by(x))
#define REQUIRES(...) SLUICE_LOCK_ATTRIBUTE(requires_capability(__VA_ARGS__))
#define EXCLUDES(...) SLUICE_LOCK_ATTRIBUTE(locks_excluded(__VA_ARGS__))
#define ACQUIRE(...) SLUICE_LOCK_ATTRIBUTE(acquire_capability(__VA_ARGS__))
#define RELEASE(...) SLUICE_LOCK_ATTRIBUTE(release_capability(__VA_ARGS__))
#define NO_THREAD_SAFETY_ANALYSIS SLUICE_LOCK_ATTRIBUTE(no_thread_safety_analysis)

namespace sluice {

/// A std::mutex whose uses clang checks.
class CAPABILITY("mutex") Mutex {
 public:
  void lock() ACQUIRE() {
    if (WaitHooks* const hooks = wait_hooks.load(std::memory_order_acquire)) [[unlikely]] {
      hooks->lock(mutex_);
      return;
    }
    mutex_.lock();
  }
  void unlock() RELEASE() {
    if (WaitHooks* const hooks = wait_hooks.load(std::memory_order_acquire)) [[unlikely]] {
      hooks->unlock(mutex_);
      return;
    }
    mutex_.unlock();
  }
  [[nodiscard]] std::mutex& native() { return mutex_; }

 private:
  std::mutex mutex_;
};

/// Holds a Mutex for a scope.
class SCOPED_CAPABILITY MutexLock {
 public:
  explicit MutexLock(Mutex& mutex) ACQUIRE(mutex) : mutex_(mutex) { mutex_.lock(); }
  ~MutexLock() RELEASE() { mutex_.unlock(); }
  MutexLock(const MutexLock&) = delete;
  MutexLock& operator=(const MutexLock&) = delete;

 private:
  Mutex& mutex_;
};

/// A condition variable over Mutex. Waits may wake spuriously: callers loop over their predicate.
class CondVar {
 public:
  void wait(Mutex& mutex) REQUIRES(mutex) {
    if (WaitHooks* const hooks = wait_hooks.load(std::memory_order_acquire)) [[unlikely]] {
      hooks->wait(this, mutex.native(), std::nullopt);
      return;
    }
    std::unique_lock<std::mutex> lock(mutex.native(), std::adopt_lock);
    cv_.wait(lock);
    lock.release();
  }
  /// Returns after a notification or about `timeout` later, whichever is first.
  void wait_for(Mutex& mutex, std::chrono::nanoseconds timeout) REQUIRES(mutex) {
    if (WaitHooks* const hooks = wait_hooks.load(std::memory_order_acquire)) [[unlikely]] {
      hooks->wait(this, mutex.native(), timeout);
      return;
    }
    std::unique_lock<std::mutex> lock(mutex.native(), std::adopt_lock);
#if defined(__SANITIZE_THREAD__)
    // gcc 12's thread sanitizer does not know pthread_cond_clockwait, by which one waits on the
    // steady clock, and reports a double lock.
    cv_.wait_until(lock, std::chrono::system_clock::now() + timeout);
#else
    cv_.wait_for(lock, timeout);
#endif
    lock.release();
  }
  void notify_one() noexcept {
    if (WaitHooks* const hooks = wait_hooks.load(std::memory_order_acquire)) [[unlikely]] {
      hooks->notify(this, false);
    }
    cv_.notify_one();
  }
  void notify_all() noexcept {
    if (WaitHooks* const hooks = wait_hooks.load(std::memory_order_acquire)) [[unlikely]] {
      hooks->notify(this, true);
    }
    cv_.notify_all();
  }

 private:
  std::condition_variable cv_;
};

}  // namespace sluice
