#pragma once

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <functional>

#include "store/file_calls.h"

namespace sluice::testing {

/// A disk with faults, while it is alive: each `*_fails_in` counts calls down and lets the one that
/// reaches 0, and all later ones, fail with `error`; -1: never.
class FaultDisk {
 public:
  FaultDisk() : saved_(file_calls()) {
    self_ = this;
    file_calls() = {.pread = &pread,
                    .pwrite = &pwrite,
                    .fdatasync = &fdatasync,
                    .flock = &flock,
                    .free_bytes = &free_bytes};
  }
  ~FaultDisk() {
    file_calls() = saved_;
    self_ = nullptr;
  }
  FaultDisk(const FaultDisk&) = delete;
  FaultDisk& operator=(const FaultDisk&) = delete;

  std::atomic<std::int64_t> reads{0};
  std::atomic<std::int64_t> read_fails_in{-1};
  std::atomic<std::int64_t> short_reads{0};        ///< so many reads end early …
  std::atomic<std::size_t> short_read_bytes{0};    ///< … after so many bytes
  std::atomic<std::int64_t> interrupted_calls{0};  ///< so many calls give EINTR first
  std::atomic<bool> refuses_direct{false};         ///< O_DIRECT opens, then gives EINVAL
  std::atomic<std::int64_t> write_fails_in{-1};
  std::atomic<std::int64_t> short_writes{0};
  std::atomic<std::int64_t> sync_fails_in{-1};
  std::atomic<std::int64_t> syncs{0};
  std::atomic<std::uint64_t> free{UINT64_MAX};
  std::atomic<int> error{EIO};
  /// Called before each read; on the reading thread.
  std::function<void()> before_read;
  /// Called before each lock is asked for.
  std::function<void()> before_lock;
  /// Called after each write and sync: where a test kills its process.
  void (*after_write)() = nullptr;

 private:
  static bool due(std::atomic<std::int64_t>& countdown) {
    if (countdown.load() < 0) return false;
    if (countdown.load() == 0) return true;
    return countdown.fetch_sub(1) <= 1;
  }
  static bool take(std::atomic<std::int64_t>& left) {
    if (left.load() <= 0) return false;
    return left.fetch_sub(1) > 0;
  }
  static int fail(int number) {
    errno = number;
    return -1;
  }

  static ssize_t pread(int fd, void* target, std::size_t bytes, off_t offset);
  static ssize_t pwrite(int fd, const void* source, std::size_t bytes, off_t offset);
  static int fdatasync(int fd);
  static int flock(int fd, int operation);
  static std::uint64_t free_bytes(int fd);

  static inline FaultDisk* self_ = nullptr;
  FileCalls saved_;
};

}  // namespace sluice::testing
