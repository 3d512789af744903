#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <thread>

#include "base/fork_mutex.h"

namespace sluice {

/// A disk of `bytes_per_second`, for benchmarks: reads queue behind each other and each ends no
/// sooner than its bytes would have taken. 0: no limit.
///
/// Thread safety: all members.
class RateLimit {
 public:
  using Clock = std::chrono::steady_clock;
  using Instant = Clock::time_point;

  explicit RateLimit(std::uint64_t bytes_per_second) : bytes_per_second_(bytes_per_second) {}

  /// Sleeps until the `bytes` of a read that began at `begun` would have passed. Called after the
  /// read, so that real reading overlaps. Time in which nobody read is lost, as a disk's is.
  void pass(std::uint64_t bytes, Instant begun) EXCLUDES(mu_) {
    if (bytes_per_second_ == 0) return;
    const std::chrono::duration<double> cost(static_cast<double>(bytes) /
                                             static_cast<double>(bytes_per_second_));
    Instant end;
    {
      const MutexLock lock(mu_);
      free_at_ = std::max(free_at_, begun) + std::chrono::duration_cast<Clock::duration>(cost);
      end = free_at_;
    }
    std::this_thread::sleep_until(end);
  }

 private:
  const std::uint64_t bytes_per_second_;
  ForkMutex mu_;
  Instant free_at_ GUARDED_BY(mu_){};
};

}  // namespace sluice
