// Capture appends to a list, a launch queues a clone of it.
#include "tests/emulation/fake_cuda/graph.h"

#include <algorithm>

namespace fake {
namespace {

cudaError_t invalidate(Session& session, Capture& capture, cudaError_t error,
                       const std::string& why) {
  capture.invalidated = true;
  return session.fail(error, why + "; the capture of " + capture.stream->name() + " is invalid");
}

std::vector<std::unique_ptr<Work>> clone_all(const std::vector<std::unique_ptr<Work>>& works) {
  std::vector<std::unique_ptr<Work>> clones;
  clones.reserve(works.size());
  for (const auto& work : works) clones.push_back(work->clone());
  return clones;
}

}  // namespace

cudaError_t refuse_in_capture(Session& session, const detail::ApiTraits& traits) {
  const cudaStreamCaptureMode mode = session.thread.capture_mode;
  if (!traits.unsafe_in_capture || mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
  cudaError_t error = cudaSuccess;
  for (const auto& weak : session.runtime.captures) {
    const std::shared_ptr<Capture> capture = weak.lock();
    if (capture == nullptr || capture->mode == cudaStreamCaptureModeRelaxed) continue;
    const bool same_thread = capture->thread == &session.thread;
    const bool only_own = capture->mode == cudaStreamCaptureModeThreadLocal ||
                          mode == cudaStreamCaptureModeThreadLocal;
    if (only_own && !same_thread) continue;
    error = invalidate(session, *capture, cudaErrorStreamCaptureUnsupported,
                       std::string("got the call on ") + (same_thread ? "the" : "another") +
                           " thread of a capture, expected none that may wait or allocate");
  }
  return error;
}

cudaError_t append(Session& session, CUstream_st& stream, std::unique_ptr<Work> work) {
  Capture& capture = *stream.capture;
  if (capture.invalidated) {
    return session.fail(cudaErrorStreamCaptureInvalidated,
                        "got work for " + stream.name() + ", whose capture is invalid");
  }
  capture.works.push_back(std::move(work));
  return cudaSuccess;
}

cudaError_t refuse_captured(Session& session, CUstream_st& stream, const std::string& what) {
  if (stream.capture == nullptr) return cudaSuccess;
  return invalidate(session, *stream.capture, cudaErrorStreamCaptureUnsupported,
                    "got " + what + " of a capturing stream, expected work that a graph can hold");
}

cudaError_t refuse_implicit(Session& session, const CUstream_st& stream) {
  cudaError_t error = cudaSuccess;
  if (!stream.legacy) return error;
  for (const auto& weak : session.runtime.captures) {
    const std::shared_ptr<Capture> capture = weak.lock();
    if (capture == nullptr || !capture->stream->blocking) continue;
    if (capture->stream->device != stream.device) continue;
    error =
        invalidate(session, *capture, cudaErrorStreamCaptureImplicit,
                   "got work for the default stream, which a captured blocking stream waits for");
  }
  return error;
}

}  // namespace fake

using fake::Api;
using fake::call;
using fake::Session;

extern "C" {

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  return call(Api::kStreamBeginCapture, handle, [&](Session& session) {
    cudaError_t error = cudaSuccess;
    CUstream_st* const stream = session.stream(handle, &error);
    if (stream == nullptr) return error;
    if (stream->legacy) {
      return session.fail(cudaErrorStreamCaptureUnsupported,
                          "got " + stream->name() + ", expected a stream of your own");
    }
    if (stream->capture != nullptr) {
      return session.fail(cudaErrorIllegalState, "got " + stream->name() + ", which captures");
    }
    stream->capture = std::make_shared<fake::Capture>();
    stream->capture->stream = stream;
    stream->capture->mode = mode;
    stream->capture->thread = &session.thread;
    session.runtime.captures.emplace_back(stream->capture);
    return cudaSuccess;
  });
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  return call(Api::kStreamEndCapture, handle, [&](Session& session) {
    cudaError_t error = cudaSuccess;
    CUstream_st* const stream = session.stream(handle, &error);
    if (stream == nullptr) return error;
    if (stream->capture == nullptr) {
      return session.fail(cudaErrorIllegalState,
                          "got " + stream->name() + ", expected one that captures");
    }
    const std::shared_ptr<fake::Capture> capture = std::move(stream->capture);
    *graph = nullptr;
    if (capture->mode != cudaStreamCaptureModeRelaxed && capture->thread != &session.thread) {
      return session.fail(cudaErrorStreamCaptureWrongThread,
                          "got the end of a capture that another thread began");
    }
    if (capture->invalidated) {
      return session.fail(
          cudaErrorStreamCaptureInvalidated,
          "got a capture that a call made invalid: " + session.runtime.last_failure);
    }
    auto made = std::make_unique<CUgraph_st>();
    made->works = std::move(capture->works);
    *graph = made.get();
    session.runtime.graphs.emplace(made.get(), std::move(made));
    return cudaSuccess;
  });
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  return call(Api::kThreadExchangeStreamCaptureMode, nullptr, [&](Session& session) {
    if (*mode < cudaStreamCaptureModeGlobal || *mode > cudaStreamCaptureModeRelaxed) {
      return session.fail(cudaErrorInvalidValue, "got mode " + std::to_string(*mode));
    }
    std::swap(*mode, session.thread.capture_mode);
    return cudaSuccess;
  });
}

cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  return call(Api::kStreamIsCapturing, handle, [&](Session& session) {
    cudaError_t error = cudaSuccess;
    CUstream_st* const stream = session.stream(handle, &error);
    if (stream == nullptr) return error;
    if (error = fake::refuse_implicit(session, *stream); error != cudaSuccess) return error;
    *status = stream->capture == nullptr     ? cudaStreamCaptureStatusNone
              : stream->capture->invalidated ? cudaStreamCaptureStatusInvalidated
                                             : cudaStreamCaptureStatusActive;
    return cudaSuccess;
  });
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph,
                                 unsigned long long flags) {
  return call(Api::kGraphInstantiate, nullptr, [&](Session& session) {
    const auto found = session.runtime.graphs.find(graph);
    if (found == session.runtime.graphs.end() || flags != 0) {
      return session.fail(cudaErrorInvalidValue, "got graph " + fake::hex(graph) + " and flags " +
                                                     std::to_string(flags) +
                                                     ", expected a live graph and no flags");
    }
    auto made = std::make_unique<CUgraphExec_st>();
    made->device = session.thread.device;
    made->works = fake::clone_all(found->second->works);
    *executable = made.get();
    session.runtime.executables.emplace(made.get(), std::move(made));
    return cudaSuccess;
  });
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t handle) {
  return call(Api::kGraphLaunch, handle, [&](Session& session) {
    cudaError_t error = cudaSuccess;
    CUstream_st* const stream = session.stream(handle, &error);
    if (stream == nullptr) return error;
    const auto found = session.runtime.executables.find(executable);
    if (found == session.runtime.executables.end() || found->second->device != stream->device) {
      return session.fail(cudaErrorInvalidValue, "got graph " + fake::hex(executable) + " for " +
                                                     stream->name() +
                                                     ", expected a live one of that device");
    }
    error = fake::refuse_captured(session, *stream, "a graph launch");
    if (error != cudaSuccess) return error;
    for (auto& work : fake::clone_all(found->second->works)) {
      error = session.push(*stream, std::move(work));
    }
    return error;
  });
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  return call(Api::kGraphDestroy, nullptr, [&](Session& session) {
    if (session.runtime.graphs.erase(graph) == 1) return cudaSuccess;
    return session.fail(cudaErrorInvalidValue,
                        "got graph " + fake::hex(graph) + ", expected a live one");
  });
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  return call(Api::kGraphExecDestroy, nullptr, [&](Session& session) {
    if (session.runtime.executables.erase(executable) == 1) return cudaSuccess;
    return session.fail(cudaErrorInvalidValue,
                        "got graph " + fake::hex(executable) + ", expected a live executable one");
  });
}

}  // extern "C"
