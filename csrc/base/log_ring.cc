#include "base/log_ring.h"

#include <algorithm>
#include <new>
#include <utility>

namespace sluice {

LogRing::LogRing(std::size_t capacity)
    : capacity_(std::max<std::size_t>(capacity, 1)), records_(capacity_) {}

void LogRing::log(LogLevel level, std::string_view text) noexcept {
  LogRecord record{.time = SteadyClock().now(), .level = level, .text = {}};
  bool kept = true;
  try {
    record.text.assign(text.substr(0, kMaxText));
  } catch (const std::bad_alloc&) {
    kept = false;
  }
  MutexLock lock(mu_);
  if (!kept) {
    ++lost_;
    return;
  }
  if (count_ == capacity_) {
    first_ = (first_ + 1) % capacity_;
    --count_;
    ++lost_;
  }
  // Swapped in: the old text is freed after the lock.
  std::swap(records_[(first_ + count_) % capacity_], record);
  ++count_;
}

std::vector<LogRecord> LogRing::drain() {
  std::vector<LogRecord> taken;
  taken.reserve(capacity_);  // outside the lock
  MutexLock lock(mu_);
  for (; count_ > 0; --count_, first_ = (first_ + 1) % capacity_) {
    taken.push_back(std::exchange(records_[first_], {}));
  }
  return taken;
}

std::uint64_t LogRing::lost() const {
  MutexLock lock(mu_);
  return lost_;
}

LogRing& log_ring() {
  static LogRing* const kRing = new LogRing;  // never destroyed: threads may log during exit
  return *kRing;
}

}  // namespace sluice
