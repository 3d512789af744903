#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <new>
#include <set>
#include <utility>
#include <variant>
#include <vector>

#include "base/bytes.h"
#include "base/error.h"
#include "base/mutex.h"
#include "device/device.h"

namespace sluice::testing {

/// A device whose streams stand still until the test steps them: one copy, event or wait at a time,
/// streams in the order that the test chooses. Memory is RAM; fresh buffers hold 0xA5.
///
/// `synchronize` steps the streams itself, lowest handle first, so that code that may wait does not
/// hang; it throws DeviceError where nothing can move.
///
/// Thread safety: every member.
class SteppedDevice final : public Device {
 public:
  ~SteppedDevice() override = default;

  [[nodiscard]] DeviceTraits traits() const override {
    return {.name = "stepped", .slots_in_ram = true};
  }
  [[nodiscard]] DeviceBuffer allocate_slab(std::size_t bytes) override {
    return allocate(bytes, MemoryKind::kDevice);
  }
  [[nodiscard]] DeviceBuffer allocate_host(std::size_t bytes) override {
    return allocate(bytes, MemoryKind::kHost);
  }
  [[nodiscard]] bool pin(DeviceBuffer& buffer) override {
    if (on_pin_) on_pin_();
    set_kind(buffer, MemoryKind::kPinned);
    return true;
  }
  [[nodiscard]] MemoryInfo memory_info() override { return {}; }
  [[nodiscard]] StreamHandle copy_stream() override { return StreamHandle{1}; }

  void copy_async(std::byte* target, const std::byte* source, std::size_t bytes,
                  StreamHandle stream) override EXCLUDES(mu_) {
    MutexLock lock(mu_);
    streams_[stream].push_back(Copy{target, source, bytes});
  }
  void read_async(std::byte* target, const std::byte* source, std::size_t bytes,
                  StreamHandle stream) override {
    copy_async(target, source, bytes, stream);
  }
  [[nodiscard]] bool is_capturing(StreamHandle /*stream*/) override { return false; }
  [[nodiscard]] EventHandle record(StreamHandle stream) override EXCLUDES(mu_) {
    MutexLock lock(mu_);
    const EventHandle event{++last_event_};
    live_events_.insert(event);
    if (events_pass_at_once_) return event;
    not_passed_.insert(event);
    streams_[stream].push_back(Record{event});
    return event;
  }
  void wait(StreamHandle stream, EventHandle event) override EXCLUDES(mu_) {
    if (event == EventHandle{}) return;
    MutexLock lock(mu_);
    streams_[stream].push_back(Wait{event});
  }
  void synchronize(EventHandle event) override EXCLUDES(mu_) {
    while (!passed(event)) {
      if (!step_first())
        throw DeviceError("synchronize: got streams that stand still, expected one that moves");
    }
  }
  [[nodiscard]] bool passed(EventHandle event) override EXCLUDES(mu_) {
    MutexLock lock(mu_);
    return !not_passed_.contains(event);
  }
  void share(EventHandle event, int more) noexcept override EXCLUDES(mu_) {
    MutexLock lock(mu_);
    for (int i = 0; i < more; ++i) live_events_.insert(event);
  }
  void release(EventHandle event) noexcept override EXCLUDES(mu_) {
    MutexLock lock(mu_);
    if (const auto found = live_events_.find(event); found != live_events_.end()) {
      live_events_.erase(found);
    }
  }

  // What the test does.

  /// Does the next thing of one stream. False if it is empty or waits for an event.
  bool step(StreamHandle stream) EXCLUDES(mu_) {
    MutexLock lock(mu_);
    std::deque<Operation>& queue = streams_[stream];
    if (queue.empty()) return false;
    const Operation& next = queue.front();
    if (const auto* const wait = std::get_if<Wait>(&next);
        wait && not_passed_.contains(wait->event))
      return false;
    if (const auto* const copy = std::get_if<Copy>(&next))
      std::memcpy(copy->target, copy->source, copy->bytes);
    if (const auto* const record = std::get_if<Record>(&next)) not_passed_.erase(record->event);
    queue.pop_front();
    return true;
  }
  /// Steps until no stream moves; how many steps that took.
  int run() EXCLUDES(mu_) {
    int steps = 0;
    while (step_first()) ++steps;
    return steps;
  }
  /// Whether later events pass when recorded, as on a host device (default: no).
  void set_events_pass_at_once(bool at_once) EXCLUDES(mu_) {
    MutexLock lock(mu_);
    events_pass_at_once_ = at_once;
  }

  /// Called first thing in `pin`; what it throws is the error.
  void set_on_pin(std::function<void()> on_pin) { on_pin_ = std::move(on_pin); }

  [[nodiscard]] std::size_t num_live_events() const EXCLUDES(mu_) {
    MutexLock lock(mu_);
    return live_events_.size();
  }
  [[nodiscard]] std::size_t live_bytes() const EXCLUDES(mu_) {
    MutexLock lock(mu_);
    return live_bytes_;
  }
  [[nodiscard]] std::size_t num_queued(StreamHandle stream) EXCLUDES(mu_) {
    MutexLock lock(mu_);
    return streams_[stream].size();
  }

 private:
  struct Copy {
    std::byte* target;
    const std::byte* source;
    std::size_t bytes;
  };
  struct Record {
    EventHandle event;
  };
  struct Wait {
    EventHandle event;
  };
  using Operation = std::variant<Copy, Record, Wait>;

  DeviceBuffer allocate(std::size_t bytes, MemoryKind kind) EXCLUDES(mu_) {
    MutexLock lock(mu_);
    const std::size_t padded = align_up(bytes == 0 ? 1 : bytes, kDirectAlignment);
    auto* const data = static_cast<std::byte*>(std::aligned_alloc(kDirectAlignment, padded));
    if (data == nullptr) throw std::bad_alloc();
    std::memset(data, 0xA5, padded);
    live_bytes_ += bytes;
    return {this, data, bytes, kind};
  }
  void free_buffer(std::byte* data, std::size_t bytes, MemoryKind /*kind*/) noexcept override
      EXCLUDES(mu_) {
    MutexLock lock(mu_);
    live_bytes_ -= bytes;
    std::free(data);
  }
  bool step_first() EXCLUDES(mu_) {
    std::vector<StreamHandle> handles;
    {
      MutexLock lock(mu_);
      for (const auto& [handle, queue] : streams_) handles.push_back(handle);
    }
    for (const StreamHandle handle : handles)
      if (step(handle)) return true;
    return false;
  }

  std::function<void()> on_pin_;
  mutable Mutex mu_;
  std::map<StreamHandle, std::deque<Operation>> streams_ GUARDED_BY(mu_);
  std::uint64_t last_event_ GUARDED_BY(mu_) = 0;
  std::multiset<EventHandle> live_events_ GUARDED_BY(mu_);  // once for each owner
  std::set<EventHandle> not_passed_ GUARDED_BY(mu_);
  std::size_t live_bytes_ GUARDED_BY(mu_) = 0;
  bool events_pass_at_once_ GUARDED_BY(mu_) = false;
};

}  // namespace sluice::testing
