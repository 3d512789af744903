#include <functional>
#include <map>
#include <thread>

#include "tests/emulation/fake_cuda_fixture.h"
#include "tests/emulation/planted/streams.h"

namespace fake {
namespace {

class FakeCudaFaults : public FakeCuda {};

// Every call that can fail, in a state in which it succeeds.
std::map<Api, std::function<cudaError_t()>> calls() {
  static void* memory;
  static void* host;
  static char pages[4096];
  static cudaStream_t queue;
  static cudaEvent_t mark, timed;
  static cudaGraph_t graph;
  static cudaGraphExec_t executable;
  static float heap[16];
  memory = host = nullptr;
  queue = nullptr;
  mark = timed = nullptr;
  graph = nullptr;
  executable = nullptr;
  const auto make = [] {
    (void)cudaMalloc(&memory, 64);
    (void)cudaHostAlloc(&host, 64, 0);
    (void)cudaStreamCreateWithFlags(&queue, cudaStreamNonBlocking);
    (void)cudaEventCreateWithFlags(&mark, cudaEventDisableTiming);
    (void)cudaEventCreateWithFlags(&timed, cudaEventDefault);
    (void)cudaEventRecord(timed, queue);
    (void)cudaStreamSynchronize(queue);
    (void)cudaStreamBeginCapture(queue, cudaStreamCaptureModeRelaxed);
    (void)cudaStreamEndCapture(queue, &graph);
    (void)cudaGraphInstantiate(&executable, graph, 0);
  };
  make();
  static int number;
  static std::size_t bytes;
  static cudaPointerAttributes attributes;
  static cudaStreamCaptureStatus status;
  static cudaStreamCaptureMode mode;
  static cudaFuncAttributes of_kernel;
  static float milliseconds;
  static cudaStream_t other;
  static cudaEvent_t other_event;
  static void* other_memory;
  return {
      {Api::kMalloc, [] { return cudaMalloc(&other_memory, 64); }},
      {Api::kFree, [] { return cudaFree(memory); }},
      {Api::kHostAlloc, [] { return cudaHostAlloc(&other_memory, 64, 0); }},
      {Api::kFreeHost, [] { return cudaFreeHost(host); }},
      {Api::kHostRegister, [] { return cudaHostRegister(pages, 4096, 0); }},
      {Api::kHostUnregister,
       [] {
         (void)cudaHostRegister(pages, 4096, 0);
         return cudaHostUnregister(pages);
       }},
      {Api::kMemGetInfo, [] { return cudaMemGetInfo(&bytes, &bytes); }},
      {Api::kPointerGetAttributes, [] { return cudaPointerGetAttributes(&attributes, heap); }},
      {Api::kMemcpyAsync,
       [] { return cudaMemcpyAsync(memory, host, 64, cudaMemcpyHostToDevice, queue); }},
      {Api::kMemsetAsync, [] { return cudaMemsetAsync(memory, 0, 64, queue); }},
      {Api::kStreamCreate, [] { return cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking); }},
      {Api::kStreamDestroy, [] { return cudaStreamDestroy(queue); }},
      {Api::kStreamSynchronize, [] { return cudaStreamSynchronize(queue); }},
      {Api::kStreamQuery, [] { return cudaStreamQuery(queue); }},
      {Api::kStreamWaitEvent, [] { return cudaStreamWaitEvent(queue, mark, 0); }},
      {Api::kStreamIsCapturing, [] { return cudaStreamIsCapturing(queue, &status); }},
      {Api::kStreamBeginCapture,
       [] { return cudaStreamBeginCapture(queue, cudaStreamCaptureModeRelaxed); }},
      {Api::kStreamEndCapture,
       [] {
         (void)cudaStreamBeginCapture(queue, cudaStreamCaptureModeRelaxed);
         return cudaStreamEndCapture(queue, &graph);
       }},
      {Api::kThreadExchangeStreamCaptureMode,
       [] { return cudaThreadExchangeStreamCaptureMode(&mode); }},
      {Api::kEventCreate, [] { return cudaEventCreateWithFlags(&other_event, 0); }},
      {Api::kEventDestroy, [] { return cudaEventDestroy(mark); }},
      {Api::kEventRecord, [] { return cudaEventRecord(mark, queue); }},
      {Api::kEventQuery, [] { return cudaEventQuery(mark); }},
      {Api::kEventSynchronize, [] { return cudaEventSynchronize(mark); }},
      {Api::kEventElapsedTime, [] { return cudaEventElapsedTime(&milliseconds, timed, timed); }},
      {Api::kLaunchKernel, [] { return planted::launch_empty({1}, {1}, queue); }},
      {Api::kLaunchHostFunc,
       [] { return cudaLaunchHostFunc(queue, [](void* /*unused*/) {}, nullptr); }},
      {Api::kFuncSetAttribute,
       [] {
         return cudaFuncSetAttribute(heap, cudaFuncAttributeMaxDynamicSharedMemorySize, 60'000);
       }},
      {Api::kFuncGetAttributes, [] { return cudaFuncGetAttributes(&of_kernel, heap); }},
      {Api::kGraphInstantiate, [] { return cudaGraphInstantiate(&executable, graph, 0); }},
      {Api::kGraphLaunch, [] { return cudaGraphLaunch(executable, queue); }},
      {Api::kGraphDestroy, [] { return cudaGraphDestroy(graph); }},
      {Api::kGraphExecDestroy, [] { return cudaGraphExecDestroy(executable); }},
      {Api::kSetDevice, [] { return cudaSetDevice(0); }},
      {Api::kGetDevice, [] { return cudaGetDevice(&number); }},
      {Api::kGetDeviceCount, [] { return cudaGetDeviceCount(&number); }},
      {Api::kDeviceGetAttribute,
       [] { return cudaDeviceGetAttribute(&number, cudaDevAttrWarpSize, 0); }},
      {Api::kDeviceGetStreamPriorityRange,
       [] { return cudaDeviceGetStreamPriorityRange(&number, &number); }},
      {Api::kDeviceSynchronize, [] { return cudaDeviceSynchronize(); }},
      {Api::kRuntimeGetVersion, [] { return cudaRuntimeGetVersion(&number); }},
      {Api::kDriverGetVersion, [] { return cudaDriverGetVersion(&number); }},
  };
}

TEST_F(FakeCudaFaults, EveryCallFailsWhenAskedToAndOnce) {
  const auto all = calls();
  EXPECT_EQ(all.size(), kNumApis - 2u) << "all but the two that tell errors";
  for (const auto& [api, unused] : all) {
    start({});
    const auto call = calls().at(api);
    fail_after(api, 1, cudaErrorUnknown);
    EXPECT_CUDA(call()) << name(api);
    start({});
    const auto again = calls().at(api);
    fail_after(api, 0, cudaErrorUnknown);
    EXPECT_REFUSED(again(), cudaErrorUnknown,
                   (std::string(name(api)) + ": injected cudaErrorUnknown").c_str());
    EXPECT_EQ(injected(), 1);
    EXPECT_EQ(cudaPeekAtLastError(), cudaErrorUnknown);
    EXPECT_EQ(cudaGetLastError(), cudaErrorUnknown);
    EXPECT_EQ(cudaGetLastError(), cudaSuccess);
  }
}

TEST_F(FakeCudaFaults, ALostDeviceAnswersEverythingWithWhatItDiedOf) {
  constexpr Api kUnaffected[] = {Api::kSetDevice,
                                 Api::kGetDevice,
                                 Api::kGetDeviceCount,
                                 Api::kDeviceGetAttribute,
                                 Api::kRuntimeGetVersion,
                                 Api::kDriverGetVersion,
                                 Api::kThreadExchangeStreamCaptureMode};
  for (const auto& [api, unused] : calls()) {
    start({});
    const auto call = calls().at(api);
    const Stats before = stats();
    fail_after(Api::kDeviceSynchronize, 0, cudaErrorECCUncorrectable, true);
    EXPECT_EQ(cudaDeviceSynchronize(), cudaErrorECCUncorrectable);
    const bool unaffected =
        std::find(std::begin(kUnaffected), std::end(kUnaffected), api) != std::end(kUnaffected);
    EXPECT_EQ(call(), unaffected ? cudaSuccess : cudaErrorECCUncorrectable) << name(api);
    const Stats after = stats();
    EXPECT_EQ(after.device_allocations, before.device_allocations - (api == Api::kFree ? 1 : 0));
    EXPECT_EQ(after.streams, before.streams - (api == Api::kStreamDestroy ? 1 : 0));
    EXPECT_EQ(after.events, before.events - (api == Api::kEventDestroy ? 1 : 0));
  }
}

TEST_F(FakeCudaFaults, ADeviceCanBeLostInTheMiddleOfItsWork) {
  for (int steps = 0;; ++steps) {
    start({.policy = Policy::kLazy});
    float* const memory = device(4000);
    const cudaStream_t queue = stream();
    copy(memory, pinned(4000, 1.0f), 4000, queue);
    EXPECT_CUDA(planted::launch_add_one({memory, memory, 4000}, true, queue));
    fault_after_steps(steps, cudaErrorECCUncorrectable);
    const cudaError_t code = cudaStreamSynchronize(queue);
    if (injected() == 0) {
      EXPECT_EQ(code, cudaSuccess);
      EXPECT_GE(steps, 6) << "a copy of four chunks, a grid";
      break;
    }
    EXPECT_EQ(code, cudaErrorECCUncorrectable);
    const char* const where = steps < 5 ? "in copy of 16000 bytes" : "in kernel add_one";
    EXPECT_NE(last_failure().find(where), std::string::npos) << last_failure();
    EXPECT_EQ(stats().queued, 0);
  }
}

TEST_F(FakeCudaFaults, OneLostDeviceLeavesTheOthers) {
  start({.num_devices = 2});
  const cudaStream_t dead = stream();
  const cudaEvent_t mark = event();
  EXPECT_CUDA(cudaEventRecord(mark, dead));
  EXPECT_CUDA(cudaSetDevice(1));
  float* const memory = device(10);
  const cudaStream_t alive = stream();
  EXPECT_CUDA(cudaStreamWaitEvent(alive, mark, 0));
  copy(memory, pinned(10, 1.0f), 10, alive);
  EXPECT_CUDA(cudaSetDevice(0));
  fail_after(Api::kMemGetInfo, 0, cudaErrorIllegalAddress, true);
  std::size_t bytes = 0;
  EXPECT_EQ(cudaMemGetInfo(&bytes, &bytes), cudaErrorIllegalAddress);
  EXPECT_CUDA(cudaSetDevice(1));
  EXPECT_EQ(cudaStreamSynchronize(dead), cudaErrorIllegalAddress) << "told of the stream's device";
  EXPECT_CUDA(cudaStreamSynchronize(alive));
}

TEST_F(FakeCudaFaults, TheLastErrorIsTheThreadsOwn) {
  EXPECT_EQ(cudaSetDevice(5), cudaErrorInvalidDevice);
  std::thread([] {
    EXPECT_EQ(cudaPeekAtLastError(), cudaSuccess);
    int device = -1;
    EXPECT_CUDA(cudaGetDevice(&device));
    EXPECT_EQ(device, 0);
  }).join();
  EXPECT_EQ(cudaGetLastError(), cudaErrorInvalidDevice);
  EXPECT_EQ(cudaSetDevice(5), cudaErrorInvalidDevice);
  start({});
  EXPECT_EQ(cudaGetLastError(), cudaSuccess) << "of the run before";
}

TEST_F(FakeCudaFaults, TheCurrentDeviceIsTheThreadsOwn) {
  start({.num_devices = 3});
  EXPECT_CUDA(cudaSetDevice(2));
  std::thread([] {
    int device = -1;
    EXPECT_CUDA(cudaGetDevice(&device));
    EXPECT_EQ(device, 0);
    EXPECT_CUDA(cudaSetDevice(1));
  }).join();
  int device = -1;
  EXPECT_CUDA(cudaGetDevice(&device));
  EXPECT_EQ(device, 2);
}

TEST_F(FakeCudaFaults, AMachineWithoutADeviceSaysSo) {
  start({.num_devices = 0});
  int count = -1;
  EXPECT_EQ(cudaGetDeviceCount(&count), cudaErrorNoDevice);
  EXPECT_EQ(count, 0);
  void* memory = nullptr;
  EXPECT_REFUSED(cudaMalloc(&memory, 10), cudaErrorNoDevice, "got no device");
  start({});
  fail_after(Api::kGetDeviceCount, 0, cudaErrorInsufficientDriver);
  EXPECT_EQ(cudaGetDeviceCount(&count), cudaErrorInsufficientDriver);
}

TEST_F(FakeCudaFaults, DevicesAnswerFromTheModel) {
  start({.model = {.compute_major = 8, .compute_minor = 6, .num_multiprocessors = 7}});
  const auto attribute = [](cudaDeviceAttr which) {
    int value = -1;
    EXPECT_CUDA(cudaDeviceGetAttribute(&value, which, 0));
    return value;
  };
  EXPECT_EQ(attribute(cudaDevAttrComputeCapabilityMajor), 8);
  EXPECT_EQ(attribute(cudaDevAttrComputeCapabilityMinor), 6);
  EXPECT_EQ(attribute(cudaDevAttrMultiProcessorCount), 7);
  EXPECT_EQ(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin), 227 * 1024);
  int value = -1;
  EXPECT_REFUSED(cudaDeviceGetAttribute(&value, cudaDevAttrMaxTexture1DWidth, 0),
                 cudaErrorInvalidValue, "which is not emulated; add it to");
  EXPECT_EQ(cudaDeviceGetAttribute(&value, cudaDevAttrWarpSize, 1), cudaErrorInvalidDevice);
}

TEST_F(FakeCudaFaults, ErrorsHaveTheirNamesAndTexts) {
  EXPECT_STREQ(cudaGetErrorName(cudaErrorMemoryAllocation), "cudaErrorMemoryAllocation");
  EXPECT_STREQ(cudaGetErrorString(cudaErrorMemoryAllocation), "out of memory");
  EXPECT_STREQ(cudaGetErrorName(static_cast<cudaError_t>(12345)), "unrecognized error code");
}

}  // namespace
}  // namespace fake
