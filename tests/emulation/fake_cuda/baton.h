#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <random>
#include <vector>

#include "base/wait_hooks.h"

namespace fake {

/// Lets one host thread run at a time, so that the same seed is the same interleaving with several.
///
/// A thread takes part from its first call of the runtime, or its first use of base/mutex.h, and
/// gives the baton away at each of them; the seed chooses who is next. Two things it cannot see: a
/// thread that was started and has not arrived yet (`expect`), and a holder that waits by other
/// means than base's (a future, a join, a file; see `step_out`). The latter loses the baton after a
/// while, which is counted, and queues again at its next call.
///
/// Thread safety: any thread. It never takes another lock while it holds its own.
class Baton final : public sluice::WaitHooks {
 public:
  static Baton& get();

  /// On: with that seed and nobody taking part. Off: everybody runs. Wants all threads but the
  /// caller's outside of the runtime and of base's waits.
  void set(bool on, std::uint64_t seed, std::chrono::milliseconds patience);
  /// A point where another thread may go on. Nothing when off.
  void yield();
  /// The next `yield` of the caller returns once that many more threads have arrived.
  void expect(int num_threads);
  /// The calling thread ends.
  void leave();
  /// How often somebody waited by means that the baton cannot see.
  [[nodiscard]] int num_lost();

  /// The caller runs beside the others from here, for it is about to wait by its own means.
  void step_out();
  void step_in();

  void lock(std::mutex& mutex) override;
  void unlock(std::mutex& mutex) override;
  void wait(const void* condition, std::mutex& mutex,
            std::optional<std::chrono::nanoseconds> timeout) override;
  void notify(const void* condition, bool all) noexcept override;

 private:
  struct Member {
    enum class State { kRunnable, kBlocked, kOutside };
    State state = State::kRunnable;
    const void* blocked_on = nullptr;
    bool may_time_out = false;
    std::condition_variable turn;
  };
  using Lock = std::unique_lock<std::mutex>;

  Member& join(Lock& lock);
  void pass(Member& self);
  void await_turn(Member& self, Lock& lock);
  void block(Member& self, const void* on, bool may_time_out, Lock& lock);
  void wake(const void* on, bool all);

  std::mutex mutex_;
  std::condition_variable arrived_;
  bool on_ = false;
  std::chrono::milliseconds patience_{};
  std::uint64_t epoch_ = 0;
  std::mt19937_64 rng_;
  std::vector<std::shared_ptr<Member>> members_;  // in order of arrival
  Member* holder_ = nullptr;
  std::uint64_t turns_ = 0;  // how often the baton moved or stayed: the holder is alive
  std::size_t expected_ = 0;
  int lost_ = 0;
};

}  // namespace fake
