// Events: marks in a stream's queue that other streams, and the host, wait for.
#include "tests/emulation/fake_cuda/graph.h"
#include "tests/emulation/fake_cuda/runtime.h"

namespace fake {
namespace {

// Done as soon as everything before it is.
class Mark final : public Work {
 public:
  Progress step(Session& /*session*/, CUstream_st& /*stream*/) override { return Progress::kDone; }
  [[nodiscard]] std::unique_ptr<Work> clone() const override { return std::make_unique<Mark>(); }
  [[nodiscard]] std::string name() const override { return "event record"; }
};

// Keeps what the event meant at the call: recording it again does not move the wait.
class Wait final : public Work {
 public:
  explicit Wait(std::shared_ptr<Record> awaited) : awaited_(std::move(awaited)) {}
  Progress step(Session& /*session*/, CUstream_st& /*stream*/) override {
    return awaited_->done ? Progress::kDone : Progress::kBlocked;
  }
  [[nodiscard]] std::unique_ptr<Work> clone() const override {
    return std::make_unique<Wait>(awaited_);
  }
  [[nodiscard]] std::string name() const override { return "event wait"; }
  [[nodiscard]] bool blocked() const override { return !awaited_->done; }
  [[nodiscard]] const Record* awaited() const override { return awaited_.get(); }

 private:
  const std::shared_ptr<Record> awaited_;
};

// Waiting for an event of a capture outside of it, or the other way round.
cudaError_t refuse_mixed(Session& session, const CUstream_st& stream, const CUevent_st& event) {
  const std::shared_ptr<Capture> captured = event.captured.lock();
  if (event.in_capture == (stream.capture != nullptr) && captured == stream.capture) {
    return cudaSuccess;
  }
  for (Capture* const capture : {captured.get(), stream.capture.get()}) {
    if (capture != nullptr) capture->invalidated = true;
  }
  return session.fail(cudaErrorStreamCaptureIsolation,
                      "got an event of another stream for " + stream.name() +
                          ", expected both inside one capture (of one stream: forks are not "
                          "emulated) or both outside");
}

cudaError_t refuse_captured_event(Session& session, const CUevent_st& event) {
  if (!event.in_capture) return cudaSuccess;
  if (const auto captured = event.captured.lock()) captured->invalidated = true;
  return session.fail(cudaErrorCapturedEvent,
                      "got an event recorded in a capture, expected one that a stream will reach");
}

}  // namespace

std::unique_ptr<Work> make_wait(std::shared_ptr<Record> record) {
  return std::make_unique<Wait>(std::move(record));
}

}  // namespace fake

using fake::Api;
using fake::call;
using fake::Session;

extern "C" {

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* handle, unsigned flags) {
  return call(Api::kEventCreate, nullptr, [&](Session& session) {
    constexpr unsigned kKnown = cudaEventBlockingSync | cudaEventDisableTiming;
    if ((flags & ~kKnown) != 0) {
      return session.fail(cudaErrorInvalidValue, "got flags " + std::to_string(flags) +
                                                     ", expected blocking-sync or "
                                                     "disable-timing");
    }
    auto event = std::make_unique<CUevent_st>();
    event->device = session.thread.device;
    event->timing = (flags & cudaEventDisableTiming) == 0;
    *handle = event.get();
    session.runtime.events.emplace(event.get(), std::move(event));
    return cudaSuccess;
  });
}

cudaError_t cudaEventDestroy(cudaEvent_t handle) {
  return call(Api::kEventDestroy, nullptr, [&](Session& session) {
    cudaError_t error = cudaSuccess;
    // Waits that are queued on it stand: they hold its record.
    if (CUevent_st* const event = session.event(handle, &error)) event->alive = false;
    return error;
  });
}

cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t stream_handle) {
  return call(Api::kEventRecord, stream_handle, [&](Session& session) {
    cudaError_t error = cudaSuccess;
    CUevent_st* const event = session.event(handle, &error);
    CUstream_st* const stream = event != nullptr ? session.stream(stream_handle, &error) : nullptr;
    if (stream == nullptr) return error;
    if (stream->device != event->device) {
      return session.fail(cudaErrorInvalidResourceHandle,
                          "got an event of cuda:" + std::to_string(event->device) + " for " +
                              stream->name() + ", expected one of the stream's device");
    }
    if (error = fake::refuse_implicit(session, *stream); error != cudaSuccess) return error;
    auto mark = std::make_unique<fake::Mark>();
    event->latest = mark->record;
    event->in_capture = stream->capture != nullptr;
    event->captured = stream->capture;
    event->unanswered_queries = 0;
    return session.push(*stream, std::move(mark));
  });
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream_handle, cudaEvent_t handle, unsigned flags) {
  return call(Api::kStreamWaitEvent, stream_handle, [&](Session& session) {
    cudaError_t error = cudaSuccess;
    CUevent_st* const event = session.event(handle, &error);
    CUstream_st* const stream = event != nullptr ? session.stream(stream_handle, &error) : nullptr;
    if (stream == nullptr) return error;
    if (flags != 0) {
      return session.fail(cudaErrorInvalidValue,
                          "got flags " + std::to_string(flags) + ", expected 0");
    }
    if (error = fake::refuse_implicit(session, *stream); error != cudaSuccess) return error;
    if (event->latest == nullptr) return cudaSuccess;  // as in CUDA: nothing to wait for
    if (error = fake::refuse_mixed(session, *stream, *event); error != cudaSuccess) return error;
    // Within a capture of one stream the order of the list is the wait.
    if (stream->capture != nullptr) return cudaSuccess;
    return session.push(*stream, fake::make_wait(event->latest));
  });
}

cudaError_t cudaEventQuery(cudaEvent_t handle) {
  return call(Api::kEventQuery, nullptr, [&](Session& session) {
    cudaError_t error = cudaSuccess;
    CUevent_st* const event = session.event(handle, &error);
    if (event == nullptr) return error;
    if (error = fake::refuse_captured_event(session, *event); error != cudaSuccess) return error;
    const bool done = fake::answer_query(session, event->latest, &event->unanswered_queries);
    error = session.runtime.devices.at(event->device).fault;
    return error == cudaSuccess && !done ? cudaErrorNotReady : error;
  });
}

cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  return call(Api::kEventSynchronize, nullptr, [&](Session& session) {
    session.note_host_wait();
    cudaError_t error = cudaSuccess;
    CUevent_st* const event = session.event(handle, &error);
    if (event == nullptr) return error;
    if (error = fake::refuse_captured_event(session, *event); error != cudaSuccess) return error;
    session.drive({event->latest});
    return session.runtime.devices.at(event->device).fault;
  });
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  return call(Api::kEventElapsedTime, nullptr, [&](Session& session) {
    cudaError_t error = cudaSuccess;
    CUevent_st* const first = session.event(start, &error);
    CUevent_st* const second = first != nullptr ? session.event(end, &error) : nullptr;
    if (second == nullptr) return error;
    for (const CUevent_st* event : {first, second}) {
      if (!event->timing || event->latest == nullptr) {
        return session.fail(cudaErrorInvalidResourceHandle,
                            "got an event without a time, expected one made with timing and "
                            "recorded");
      }
      if (!event->latest->done) return cudaErrorNotReady;
    }
    const auto difference = static_cast<std::int64_t>(second->latest->done_us) -
                            static_cast<std::int64_t>(first->latest->done_us);
    *milliseconds = static_cast<float>(difference) * 1e-3f;
    return cudaSuccess;
  });
}

}  // extern "C"
