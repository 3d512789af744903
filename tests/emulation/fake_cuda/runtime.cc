#include "tests/emulation/fake_cuda/runtime.h"

#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>

#include "tests/emulation/fake_cuda/baton.h"
#include "tests/emulation/fake_cuda/graph.h"
#include "tests/emulation/simt.h"

namespace fake {

namespace detail {
namespace {

constexpr ApiTraits kTraits[] = {
    {.name = "cudaMalloc", .unsafe_in_capture = true},
    {.name = "cudaFree", .gives_back = true, .unsafe_in_capture = true},
    {.name = "cudaHostAlloc", .unsafe_in_capture = true},
    {.name = "cudaFreeHost", .gives_back = true, .unsafe_in_capture = true},
    {.name = "cudaHostRegister", .unsafe_in_capture = true},
    {.name = "cudaHostUnregister", .gives_back = true, .unsafe_in_capture = true},
    {.name = "cudaMemGetInfo"},
    {.name = "cudaPointerGetAttributes"},
    {.name = "cudaMemcpyAsync"},
    {.name = "cudaMemsetAsync"},
    {.name = "cudaStreamCreate"},
    {.name = "cudaStreamDestroy", .gives_back = true},
    {.name = "cudaStreamSynchronize"},
    {.name = "cudaStreamQuery"},
    {.name = "cudaStreamWaitEvent"},
    {.name = "cudaStreamIsCapturing"},
    {.name = "cudaStreamBeginCapture"},
    {.name = "cudaStreamEndCapture"},
    {.name = "cudaThreadExchangeStreamCaptureMode", .needs_device = false, .checks_fault = false},
    {.name = "cudaEventCreate"},
    {.name = "cudaEventDestroy", .gives_back = true},
    {.name = "cudaEventRecord"},
    {.name = "cudaEventQuery", .unsafe_in_capture = true},
    {.name = "cudaEventSynchronize", .unsafe_in_capture = true},
    {.name = "cudaEventElapsedTime"},
    {.name = "cudaLaunchKernel"},
    {.name = "cudaLaunchHostFunc"},
    {.name = "cudaFuncSetAttribute"},
    {.name = "cudaFuncGetAttributes"},
    {.name = "cudaGraphInstantiate"},
    {.name = "cudaGraphLaunch"},
    {.name = "cudaGraphDestroy", .gives_back = true},
    {.name = "cudaGraphExecDestroy", .gives_back = true},
    {.name = "cudaSetDevice", .checks_fault = false},
    {.name = "cudaGetDevice", .checks_fault = false},
    {.name = "cudaGetDeviceCount", .needs_device = false, .checks_fault = false},
    {.name = "cudaDeviceGetAttribute", .checks_fault = false},
    {.name = "cudaDeviceGetStreamPriorityRange"},
    {.name = "cudaDeviceSynchronize", .unsafe_in_capture = true},
    {.name = "cudaRuntimeGetVersion", .needs_device = false, .checks_fault = false},
    {.name = "cudaDriverGetVersion", .needs_device = false, .checks_fault = false},
    {.name = "cudaGetLastError", .needs_device = false, .checks_fault = false},
    {.name = "cudaPeekAtLastError", .needs_device = false, .checks_fault = false},
};
static_assert(std::size(kTraits) == kNumApis);

// A scenario that polls for ever must not fill the memory.
constexpr std::size_t kMaxLog = 1'000'000;

}  // namespace

const ApiTraits& traits(Api api) { return kTraits[static_cast<int>(api)]; }

cudaError_t leave(Session& session, cudaError_t error) {
  if (error != cudaSuccess) session.thread.last_error = error;
  return error;
}

}  // namespace detail

Runtime& Runtime::get() {
  static Runtime* const runtime = [] {
    auto* made = new Runtime;
    made->memory.reset(made->options);
    // A child finds the lock free, and what it guards in order.
    pthread_atfork([] { get().mutex.lock(); }, [] { get().mutex.unlock(); },
                   [] { get().mutex.unlock(); });
    return made;
  }();
  return *runtime;
}

Thread::Thread() {
  Runtime& runtime = Runtime::get();
  const std::lock_guard<std::mutex> lock(runtime.mutex);
  index = runtime.next_thread++;
  ++runtime.num_threads;
}

Thread::~Thread() {
  Runtime& runtime = Runtime::get();
  const std::lock_guard<std::mutex> lock(runtime.mutex);
  --runtime.num_threads;
  // Whoever waits for the host may have waited for this thread.
  ++runtime.activity;
  runtime.changed.notify_all();
}

Thread& this_thread() {
  thread_local Thread thread;
  return thread;
}

Session::Session(Api which, cudaStream_t handle)
    : runtime(Runtime::get()), thread(this_thread()), api(which) {
  simt::prepare_thread();
  Baton::get().yield();
  ++runtime.num_entering;
  lock = std::unique_lock<std::mutex>(runtime.mutex);
  --runtime.num_entering;
  enter(handle);
}

Session::~Session() = default;

void Session::enter(cudaStream_t handle) {
  if (runtime.devices.empty() && runtime.options.num_devices > 0) make_devices(runtime);
  if (runtime.options.forks_lose_devices && !runtime.devices.empty() && getpid() != runtime.owner) {
    is_forked = true;
    refusal = fail(cudaErrorInitializationError,
                   "got a call of a process that was forked from one with devices, expected a new "
                   "process");
    return;
  }
  if (thread.epoch != runtime.epoch) {
    thread.epoch = runtime.epoch;
    thread.device = 0;
    thread.last_error = cudaSuccess;
    thread.capture_mode = cudaStreamCaptureModeGlobal;
  }
  if (runtime.log.size() < detail::kMaxLog) {
    log_index_ = runtime.log.size();
    runtime.log.push_back(
        {.api = api, .stream = handle, .thread = thread.index, .host_waited = false});
  }
  ++runtime.activity;
  clear_stalls();
  if (runtime.num_waiting > 0) runtime.changed.notify_all();

  const detail::ApiTraits& traits = detail::traits(api);
  if (thread.in_host_function) {
    refusal = fail(cudaErrorNotPermitted,
                   "got a call inside a host function, expected none: it would wait for itself");
    return;
  }
  if (traits.needs_device && runtime.devices.empty()) {
    refusal = fail(cudaErrorNoDevice, "got no device, expected one; see fake::Options");
    return;
  }
  if (const auto found = runtime.injections.find(api); found != runtime.injections.end()) {
    if (found->second.calls_left-- == 0) {
      const Injection injection = found->second;
      runtime.injections.erase(found);
      ++runtime.num_injected;
      refusal = fail(injection.error, std::string("injected ") + cudaGetErrorName(injection.error));
      if (injection.sticky && !runtime.devices.empty()) {
        lose(device(), injection.error, runtime.last_failure);
      }
      return;
    }
  }
  if (traits.checks_fault && traits.needs_device) refusal = device().fault;
  if (refusal == cudaSuccess) refusal = refuse_in_capture(*this, traits);
}

cudaError_t Session::fail(cudaError_t error, const std::string& why) {
  runtime.last_failure = std::string(detail::traits(api).name) + ": " + why;
  return error;
}

void Session::report(const std::string& finding) {
  runtime.findings.push_back(std::string(detail::traits(api).name) + ": " + finding);
}

void Session::note_host_wait() {
  if (log_index_ && *log_index_ < runtime.log.size()) runtime.log[*log_index_].host_waited = true;
}

CUstream_st* Session::stream(cudaStream_t handle, cudaError_t* error) {
  CUstream_st* found = nullptr;
  if (handle == nullptr || handle == cudaStreamLegacy) {
    found = device().legacy;
  } else if (handle == cudaStreamPerThread) {
    *error =
        fail(cudaErrorNotSupported, "got the per-thread default stream, which is not emulated");
    return nullptr;
  } else {
    for (const auto& one : runtime.streams) {
      if (one.get() == handle && one->alive) found = one.get();
    }
  }
  if (found == nullptr) {
    *error = fail(cudaErrorInvalidResourceHandle, "got stream " + hex(handle) +
                                                      ", expected one that was created and not "
                                                      "destroyed since");
    return nullptr;
  }
  *error = runtime.devices.at(found->device).fault;
  return *error == cudaSuccess || detail::traits(api).gives_back ? found : nullptr;
}

CUevent_st* Session::event(cudaEvent_t handle, cudaError_t* error) {
  const auto found = runtime.events.find(handle);
  if (found == runtime.events.end() || !found->second->alive) {
    *error = fail(
        cudaErrorInvalidResourceHandle,
        "got event " + hex(handle) + ", expected one that was created and not destroyed since");
    return nullptr;
  }
  *error = runtime.devices.at(found->second->device).fault;
  return *error == cudaSuccess || detail::traits(api).gives_back ? found->second.get() : nullptr;
}

std::string hex(const void* pointer) {
  char text[24];
  std::snprintf(text, sizeof text, "%p", pointer);
  return text;
}

}  // namespace fake

std::string CUstream_st::name() const {
  const std::string place = "cuda:" + std::to_string(device);
  return legacy ? "the default stream of " + place
                : "stream " + std::to_string(index) + " of " + place;
}
