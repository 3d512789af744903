#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "base/error.h"
#include "base/mutex.h"
#include "base/parallel.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace sluice {
namespace {

constexpr auto kSpin = std::chrono::microseconds(50);
// Tickets per thread: a thread that loses its core to others keeps little work from them.
constexpr std::int64_t kTicketsPerThread = 8;

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

/// True once `done()` is; false after kSpin without it.
template <class Done>
bool spin_until(Done done) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 32; ++i) {
      if (done()) return true;
      pause();
    }
  } while (std::chrono::steady_clock::now() < end);
  return done();
}

/// A job is open between two stores of `gate_`, whose word is epoch << 32 | open << 31 | entered.
/// Workers enter an open gate by compare-and-swap and leave by counting `left_`; the caller closes
/// it when the tickets are gone and waits for those inside. So the fields of a job are written only
/// while nobody is inside, and a worker that wakes too late never looks at them.
class Team {
 public:
  explicit Team(int num_threads) {
    try {
      for (int i = 1; i < num_threads; ++i) workers_.emplace_back([this] { work(); });
    } catch (...) {  // the system refused a thread: those that run must end first
      stop();
      throw;
    }
  }
  ~Team() { stop(); }
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  void run(std::int64_t count, std::int64_t grain, const RangeFn& fn) {
    const auto tickets = static_cast<std::int64_t>(workers_.size() + 1) * kTicketsPerThread;
    fn_ = &fn;
    count_ = count;
    chunk_ = std::max(grain, (count + tickets - 1) / tickets);
    next_.store(0, std::memory_order_relaxed);
    left_.store(0, std::memory_order_relaxed);
    gate_.store(((gate_.load(std::memory_order_relaxed) >> 32) + 1) << 32 | kOpen);
    if (parked_workers_.load() > 0) wake(work_cv_);

    take_tickets();
    const std::uint64_t entered = gate_.fetch_and(~kOpen) & (kOpen - 1);
    const auto all_left = [&] { return left_.load() == entered; };
    if (spin_until(all_left)) return;
    MutexLock lock(mu_);
    caller_parked_.store(true);
    while (!all_left()) done_cv_.wait(mu_);
    caller_parked_.store(false);
  }

 private:
  static constexpr std::uint64_t kOpen = std::uint64_t{1} << 31;

  void take_tickets() {
    for (;;) {
      const std::int64_t begin = next_.fetch_add(chunk_, std::memory_order_relaxed);
      if (begin >= count_) return;
      (*fn_)(begin, std::min(begin + chunk_, count_));
    }
  }

  /// Enters the open job that is not `seen` yet; updates `seen` if so.
  bool enter(std::uint64_t& seen) {
    std::uint64_t gate = gate_.load();
    while ((gate & kOpen) != 0 && gate >> 32 != seen) {
      if (!gate_.compare_exchange_weak(gate, gate + 1)) continue;
      seen = gate >> 32;
      return true;
    }
    return false;
  }

  void work() {
    std::uint64_t seen = 0;
    while (!stopping_.load()) {
      if (!spin_until([&] { return enter(seen); }) && !park(seen)) continue;
      take_tickets();
      left_.fetch_add(1);
      if (caller_parked_.load()) wake(done_cv_);
    }
  }

  bool park(std::uint64_t& seen) {
    MutexLock lock(mu_);
    parked_workers_.fetch_add(1);
    bool entered = false;
    while (!stopping_.load() && !(entered = enter(seen))) work_cv_.wait(mu_);
    parked_workers_.fetch_sub(1);
    return entered;
  }

  /// The waiter either holds the lock and will see what was stored before, or is in its wait.
  void wake(CondVar& cv) {
    {
      MutexLock lock(mu_);
    }
    cv.notify_all();
  }

  void stop() {
    stopping_.store(true);
    wake(work_cv_);
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
  }

  std::vector<std::thread> workers_;

  // The job; see the class comment.
  const RangeFn* fn_ = nullptr;
  std::int64_t count_ = 0;
  std::int64_t chunk_ = 1;
  alignas(64) std::atomic<std::int64_t> next_{0};
  alignas(64) std::atomic<std::uint64_t> left_{0};
  alignas(64) std::atomic<std::uint64_t> gate_{0};

  Mutex mu_;
  CondVar work_cv_;
  CondVar done_cv_;
  std::atomic<int> parked_workers_{0};
  std::atomic<bool> caller_parked_{false};
  std::atomic<bool> stopping_{false};
};

class ThreadPool final : public ParallelFor {
 public:
  explicit ThreadPool(int num_threads)
      : owner_(getpid()),
        num_threads_(num_threads),
        team_(num_threads > 1 ? std::make_unique<Team>(num_threads) : nullptr) {}
  ~ThreadPool() override {
    // A forked child has the team's memory without its threads: nobody to join, and destroying a
    // condition variable that they wait on would wait for them. So the child leaves it behind.
    if (getpid() != owner_) (void)team_.release();
  }
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  [[nodiscard]] int num_threads() const override { return num_threads_; }

  void run(std::int64_t count, std::int64_t grain, RangeFn fn) override {
    if (count <= 0) return;
    grain = std::max<std::int64_t>(grain, 1);
    if (team_ == nullptr || count <= grain || getpid() != owner_) return fn(0, count);
    team_->run(count, grain, fn);
  }

 private:
  const pid_t owner_;
  const int num_threads_;
  std::unique_ptr<Team> team_;
};

}  // namespace

std::unique_ptr<ParallelFor> make_thread_pool(int num_threads) {
  require<ConfigError>(num_threads >= 1 && num_threads <= 4096, [&] {
    return "threads: got " + std::to_string(num_threads) + ", expected 1 to 4096";
  });
  return std::make_unique<ThreadPool>(num_threads);
}

}  // namespace sluice
