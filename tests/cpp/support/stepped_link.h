#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <functional>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "base/mutex.h"
#include "device/device.h"
#include "transfer/link.h"

namespace sluice::testing {

/// A link on which nothing moves until the test lands a chunk: any of those in flight, in any
/// order, with bytes or with an error.
///
/// `fill` writes a chunk's bytes into its slot when it lands. `device` (may be null) is asked
/// whether the chunk's last-use event has passed; before that the chunk cannot land (I2).
///
/// Thread safety: every member; the landing is reported on the thread that calls `land`.
class SteppedLink final : public Link {
 public:
  using Fill = std::function<void(const ChunkCopy& copy)>;

  explicit SteppedLink(int depth, Fill fill = {}, Device* device = nullptr)
      : depth_(depth), fill_(std::move(fill)), device_(device) {
    waiting_.reserve(static_cast<std::size_t>(depth));  // a start that throws leaves nothing behind
  }

  [[nodiscard]] int depth() const override { return depth_; }
  void set_landed(Landed landed) override { landed_ = std::move(landed); }
  void start(const ChunkCopy& copy) override EXCLUDES(mu_) {
    if (on_start_) on_start_(copy);
    MutexLock lock(mu_);
    if (std::exchange(refuse_next_, false)) throw std::runtime_error("the link refused the chunk");
    EXPECT_FALSE(closed_) << "a chunk was started on a closed link";
    history_.push_back(copy);
    waiting_.push_back(copy);
    EXPECT_LE(waiting_.size(), static_cast<std::size_t>(depth_)) << "more in flight than the depth";
  }
  void close() override EXCLUDES(mu_) {
    MutexLock lock(mu_);
    closed_ = true;
  }

  // What the test does.

  /// The chunks in flight, in the order of their start.
  [[nodiscard]] std::vector<ChunkCopy> waiting() const EXCLUDES(mu_) {
    MutexLock lock(mu_);
    return waiting_;
  }
  /// All chunks that were ever started, in order.
  [[nodiscard]] std::vector<ChunkCopy> history() const EXCLUDES(mu_) {
    MutexLock lock(mu_);
    return history_;
  }
  void clear_history() EXCLUDES(mu_) {
    MutexLock lock(mu_);
    history_.clear();
  }
  /// Lands the `position`-th chunk in flight. False if there is none or its slot is still in use.
  bool land(std::size_t position = 0) EXCLUDES(mu_) { return end(position, nullptr); }
  /// Fails it, with a runtime_error of this message.
  bool fail(std::size_t position, const std::string& message) EXCLUDES(mu_) {
    return end(position, std::make_exception_ptr(std::runtime_error(message)));
  }
  /// Lands the oldest chunk of an expert.
  bool land(ExpertKey key) EXCLUDES(mu_) { return end(position_of(key), nullptr); }
  bool fail(ExpertKey key, const std::string& message) EXCLUDES(mu_) {
    return end(position_of(key), std::make_exception_ptr(std::runtime_error(message)));
  }
  /// Called first thing in `start`; what it throws refuses the chunk. Set before the first one.
  void set_on_start(std::function<void(const ChunkCopy& copy)> on_start) {
    on_start_ = std::move(on_start);
  }
  /// The next `start` throws.
  void refuse_next() EXCLUDES(mu_) {
    MutexLock lock(mu_);
    refuse_next_ = true;
  }

 private:
  [[nodiscard]] std::size_t position_of(ExpertKey key) const EXCLUDES(mu_) {
    MutexLock lock(mu_);
    const auto found = std::find_if(waiting_.begin(), waiting_.end(),
                                    [&](const ChunkCopy& copy) { return copy.key == key; });
    return static_cast<std::size_t>(found - waiting_.begin());
  }

  bool end(std::size_t position, std::exception_ptr error) EXCLUDES(mu_) {
    ChunkCopy copy;
    {
      MutexLock lock(mu_);
      if (position >= waiting_.size()) return false;
      copy = waiting_[position];
      if (device_ != nullptr && !device_->passed(copy.last_use)) return false;
      waiting_.erase(waiting_.begin() + static_cast<std::ptrdiff_t>(position));
    }
    if (!error && fill_) fill_(copy);
    const std::uint64_t bytes_read = copy.bytes;
    landed_(copy.token, std::move(error), bytes_read);
    return true;
  }

  const int depth_;
  const Fill fill_;
  Device* const device_;
  Landed landed_;
  std::function<void(const ChunkCopy& copy)> on_start_;
  mutable Mutex mu_;
  std::vector<ChunkCopy> waiting_ GUARDED_BY(mu_);
  std::vector<ChunkCopy> history_ GUARDED_BY(mu_);
  bool refuse_next_ GUARDED_BY(mu_) = false;
  bool closed_ GUARDED_BY(mu_) = false;
};

}  // namespace sluice::testing
