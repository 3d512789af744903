#include "transfer/copy_link.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstring>
#include <thread>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/mutex.h"

namespace sluice {
namespace {

constexpr int kDepth = 2;
/// Between two looks at a copy: below what one chunk takes, above what a look costs.
constexpr std::chrono::microseconds kPoll{10};

class DeviceCopyLink final : public CopyLink {
 public:
  DeviceCopyLink(Device& device, std::size_t chunk_bytes,
                 std::function<void(std::exception_ptr)> broken)
      : device_(device), chunk_bytes_(chunk_bytes), broken_(std::move(broken)) {
    waiting_.reserve(kDepth);
    copying_.reserve(kDepth);
  }
  ~DeviceCopyLink() override { close(); }

  [[nodiscard]] int depth() const override { return kDepth; }
  [[nodiscard]] bool lands_early() const override { return true; }
  void set_landed(Landed landed) override { landed_ = std::move(landed); }
  void set_retired(Retired retired) override EXCLUDES(join_mu_) {
    retired_ = std::move(retired);
    const MutexLock lock(join_mu_);
    thread_ = std::jthread([this] { work(); });
  }

  void start(const ChunkCopy& copy) override EXCLUDES(mu_) {
    {
      const MutexLock lock(mu_);
      require<InternalError>(!closing_, [] {
        return std::string("copy link: got a chunk after close, expected none");
      });
      waiting_.push_back(copy);
    }
    changed_.notify_one();
  }

  [[nodiscard]] std::uint64_t workspace_bytes() const override { return staging_bytes_; }
  [[nodiscard]] CopyCounters counters() const override {
    return {.bytes = bytes_, .pageable_bytes = pageable_bytes_};
  }

  void close() override EXCLUDES(mu_, join_mu_) {
    {
      const MutexLock lock(mu_);
      closing_ = true;
    }
    changed_.notify_all();
    const MutexLock lock(join_mu_);
    if (!thread_.joinable()) return;
    thread_.join();
    for (DeviceBuffer& buffer : staging_) buffer = {};
    staging_bytes_ = 0;
  }

 private:
  struct Copying {
    std::uint64_t token = 0;
    EventHandle done{};
    int staging = -1;  // buffer that it is copied from
  };

  /// The next chunk, if there is one; waits for one as long as nothing is being copied.
  enum class Next : std::uint8_t { kChunk, kNone, kClosed };
  Next take(ChunkCopy& copy) EXCLUDES(mu_) {
    const MutexLock lock(mu_);
    for (;;) {
      if (!waiting_.empty()) {
        copy = waiting_.front();
        waiting_.erase(waiting_.begin());
        return Next::kChunk;
      }
      if (!copying_.empty()) {
        changed_.wait_for(mu_, kPoll);
        return Next::kNone;
      }
      if (closing_) return Next::kClosed;
      changed_.wait(mu_);
    }
  }

  void work() {
    (void)device_.enter_thread();
    ChunkCopy copy;
    for (;;) {
      const Next next = take(copy);
      if (next == Next::kClosed) return;
      if (next == Next::kChunk) enqueue(copy);
      if (failure_) continue;
      try {
        retire_passed();
      } catch (...) {
        // What is being copied is not known any more: nothing is retired, no buffer used again.
        failure_ = std::current_exception();
        copying_.clear();
        broken_(failure_);
      }
    }
  }

  void enqueue(const ChunkCopy& copy) {
    std::exception_ptr error;
    Copying copying{.token = copy.token};
    try {
      if (failure_) std::rethrow_exception(failure_);
      const StreamHandle stream = device_.copy_stream();
      const std::size_t offset = static_cast<std::size_t>(copy.chunk) * chunk_bytes_;
      const std::byte* source = copy.source + offset;
      if (copy.source_kind != MemoryKind::kPinned) {
        copying.staging = idle_staging();
        std::byte* const staged = staging_[static_cast<std::size_t>(copying.staging)].data();
        std::memcpy(staged, source, copy.bytes);
        source = staged;
      }
      device_.wait(stream, copy.last_use);  // I2: of this stream, not of this thread
      device_.copy_async(copy.slot + offset, source, copy.bytes, stream);
      copying.done = device_.record(stream);
      bytes_ += copy.bytes;
      if (copying.staging >= 0) pageable_bytes_ += copy.bytes;
      copying_.push_back(copying);
    } catch (...) {
      error = std::current_exception();
    }
    landed_(copy.token, error, error ? 0 : copy.bytes);
  }

  /// A staging buffer that nothing is copied from; there are as many as chunks ahead.
  int idle_staging() {
    if (staging_bytes_ == 0) {
      for (DeviceBuffer& buffer : staging_) buffer = device_.allocate_pinned(chunk_bytes_);
      staging_bytes_ = kDepth * chunk_bytes_;
    }
    for (int i = 0; i < kDepth; ++i) {
      const bool busy = std::any_of(copying_.begin(), copying_.end(),
                                    [&](const Copying& each) { return each.staging == i; });
      if (!busy) return i;
    }
    throw InternalError("copy link: got " + std::to_string(copying_.size()) +
                        " chunks ahead, expected fewer than " + std::to_string(kDepth));
  }

  void retire_passed() {
    while (!copying_.empty() && device_.passed(copying_.front().done)) {
      const Copying done = copying_.front();
      copying_.erase(copying_.begin());
      device_.release(done.done);
      retired_(done.token);
    }
  }

  Device& device_;
  const std::size_t chunk_bytes_;
  const std::function<void(std::exception_ptr)> broken_;
  Landed landed_;
  Retired retired_;
  std::atomic<std::uint64_t> bytes_{0};
  std::atomic<std::uint64_t> pageable_bytes_{0};
  std::atomic<std::uint64_t> staging_bytes_{0};

  // Of the link's thread.
  std::array<DeviceBuffer, kDepth> staging_;
  std::vector<Copying> copying_;  // oldest first, as the stream copies them
  std::exception_ptr failure_;    // of the device: every later chunk's error

  Mutex mu_;
  CondVar changed_;
  std::vector<ChunkCopy> waiting_ GUARDED_BY(mu_);
  bool closing_ GUARDED_BY(mu_) = false;
  Mutex join_mu_;
  std::jthread thread_ GUARDED_BY(join_mu_);
};

}  // namespace

std::int32_t SlotChunks::num_chunks(ExpertKey key) const {
  return static_cast<std::int32_t>((slot_bytes_(key) + chunk_bytes_ - 1) / chunk_bytes_);
}

std::size_t SlotChunks::chunk_bytes(ExpertKey key, std::int32_t chunk) const {
  return std::min(chunk_bytes_, slot_bytes_(key) - static_cast<std::size_t>(chunk) * chunk_bytes_);
}

std::unique_ptr<CopyLink> make_copy_link(Device& device, std::size_t chunk_bytes,
                                         std::function<void(std::exception_ptr)> broken) {
  return std::make_unique<DeviceCopyLink>(device, chunk_bytes, std::move(broken));
}

}  // namespace sluice
