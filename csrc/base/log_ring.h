#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/clock.h"
#include "base/fork_mutex.h"

namespace sluice {

/// The values of Python's `logging`.
enum class LogLevel : std::uint8_t { kDebug = 10, kInfo = 20, kWarning = 30, kError = 40 };

struct LogRecord {
  Nanos time = 0;  ///< of the steady clock
  LogLevel level = LogLevel::kInfo;
  std::string text;
};

/// The last records of the core, kept until Python drains them; workers never take the GIL.
///
/// A full ring overwrites its oldest record and counts it. The lock is held for the copy of one
/// short text, so nobody who logs waits for long.
///
/// Thread safety: every member.
class LogRing {
 public:
  /// Longer texts are cut.
  static constexpr std::size_t kMaxText = 512;

  explicit LogRing(std::size_t capacity = 1024);
  LogRing(const LogRing&) = delete;
  LogRing& operator=(const LogRing&) = delete;

  /// Never throws: destructors log. A record for which there is no memory is counted as lost.
  void log(LogLevel level, std::string_view text) noexcept;

  /// Takes all records, oldest first.
  [[nodiscard]] std::vector<LogRecord> drain();
  /// Records that were overwritten or had no memory, since the ring was made.
  [[nodiscard]] std::uint64_t lost() const;

 private:
  const std::size_t capacity_;
  mutable ForkMutex mu_;
  std::vector<LogRecord> records_ GUARDED_BY(mu_);
  std::size_t first_ GUARDED_BY(mu_) = 0;
  std::size_t count_ GUARDED_BY(mu_) = 0;
  std::uint64_t lost_ GUARDED_BY(mu_) = 0;
};

/// The ring of this process.
[[nodiscard]] LogRing& log_ring();

}  // namespace sluice
