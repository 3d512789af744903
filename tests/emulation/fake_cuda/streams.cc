// Streams: making them, waiting for them, and the order of the default one.
#include <algorithm>

#include "tests/emulation/fake_cuda/graph.h"
#include "tests/emulation/fake_cuda/runtime.h"

namespace fake {
namespace {

// How often in a row a query may say no. A host that polls without end would never see an end
// under the policies that run nothing unasked.
constexpr int kMaxUnanswered = 8;

cudaError_t create(Session& session, cudaStream_t* handle, unsigned flags, int priority) {
  const Options& options = session.runtime.options;
  if ((flags & ~static_cast<unsigned>(cudaStreamNonBlocking)) != 0) {
    return session.fail(cudaErrorInvalidValue,
                        "got flags " + std::to_string(flags) + ", expected 0 or 1 (non-blocking)");
  }
  // CUDA clamps priorities; what a stream of ours asks for is meant.
  if (priority > 0 || priority <= -options.num_priorities) {
    session.report("got priority " + std::to_string(priority) + ", expected one between 0 and " +
                   std::to_string(1 - options.num_priorities));
  }
  auto stream = std::make_unique<CUstream_st>();
  stream->index = ++session.runtime.num_handles;
  stream->device = session.thread.device;
  stream->blocking = (flags & cudaStreamNonBlocking) == 0;
  if (stream->blocking) {
    ++session.runtime.counts.blocking_streams;
    session.report(
        "got a blocking stream, expected cudaStreamNonBlocking: it waits for everything "
        "on the default stream");
  }
  *handle = stream.get();
  session.runtime.streams.push_back(std::move(stream));
  return cudaSuccess;
}

}  // namespace

bool answer_query(Session& session, const std::shared_ptr<Record>& record, int* unanswered) {
  if (record == nullptr || record->done) {
    *unanswered = 0;
    return true;
  }
  if (*unanswered >= kMaxUnanswered) {
    session.drive({record});
  } else {
    session.step_towards(*record);
  }
  *unanswered = record->done ? 0 : *unanswered + 1;
  return record->done;
}

std::vector<std::unique_ptr<Work>> legacy_waits(Session& session, const CUstream_st& stream) {
  std::vector<std::unique_ptr<Work>> waits;
  if (!stream.legacy && !stream.blocking) return waits;
  for (const auto& other : session.runtime.streams) {
    if (other->device != stream.device || (stream.legacy ? !other->blocking : !other->legacy)) {
      continue;
    }
    if (other->tail != nullptr && !other->tail->done) waits.push_back(make_wait(other->tail));
  }
  return waits;
}

}  // namespace fake

using fake::Api;
using fake::call;
using fake::Session;

extern "C" {

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* handle, unsigned flags) {
  return call(Api::kStreamCreate, nullptr,
              [&](Session& session) { return fake::create(session, handle, flags, 0); });
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* handle, unsigned flags, int priority) {
  return call(Api::kStreamCreate, nullptr,
              [&](Session& session) { return fake::create(session, handle, flags, priority); });
}

cudaError_t cudaStreamDestroy(cudaStream_t handle) {
  return call(Api::kStreamDestroy, handle, [&](Session& session) {
    cudaError_t error = cudaSuccess;
    CUstream_st* const stream = session.stream(handle, &error);
    if (stream == nullptr) return error;
    if (stream->legacy) {
      return session.fail(cudaErrorInvalidResourceHandle,
                          "got the default stream, expected one that was created");
    }
    // Returns at once, as CUDA does: queued work still runs, and the handle is refused from now on.
    stream->alive = false;
    stream->capture = nullptr;
    return error;
  });
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  return call(Api::kStreamSynchronize, handle, [&](Session& session) {
    session.note_host_wait();
    cudaError_t error = cudaSuccess;
    CUstream_st* const stream = session.stream(handle, &error);
    if (stream == nullptr) return error;
    error = fake::refuse_captured(session, *stream, "a wait for the end");
    if (error != cudaSuccess) return error;
    if (error = fake::refuse_implicit(session, *stream); error != cudaSuccess) return error;
    session.drive({stream->tail});
    return session.runtime.devices.at(stream->device).fault;
  });
}

cudaError_t cudaStreamQuery(cudaStream_t handle) {
  return call(Api::kStreamQuery, handle, [&](Session& session) {
    cudaError_t error = cudaSuccess;
    CUstream_st* const stream = session.stream(handle, &error);
    if (stream == nullptr) return error;
    error = fake::refuse_captured(session, *stream, "a query");
    if (error != cudaSuccess) return error;
    if (error = fake::refuse_implicit(session, *stream); error != cudaSuccess) return error;
    const bool done = fake::answer_query(session, stream->tail, &stream->unanswered_queries);
    error = session.runtime.devices.at(stream->device).fault;
    return error == cudaSuccess && !done ? cudaErrorNotReady : error;
  });
}

cudaError_t cudaDeviceSynchronize() {
  return call(Api::kDeviceSynchronize, nullptr, [](Session& session) {
    session.note_host_wait();
    session.drive(session.tails(session.thread.device));
    return session.device().fault;
  });
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  return call(Api::kDeviceGetStreamPriorityRange, nullptr, [&](Session& session) {
    if (least != nullptr) *least = 0;
    if (greatest != nullptr) *greatest = 1 - session.runtime.options.num_priorities;
    return cudaSuccess;
  });
}

}  // extern "C"
