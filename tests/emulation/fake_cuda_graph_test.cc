#include <thread>
#include <vector>

#include "tests/emulation/fake_cuda_fixture.h"
#include "tests/emulation/planted/streams.h"

namespace fake {
namespace {

constexpr Policy kPolicies[] = {Policy::kEager, Policy::kLazy, Policy::kAhead, Policy::kRandom};
constexpr int kCount = 3000;

class FakeCudaGraph : public FakeCuda {
 protected:
  static void begin(cudaStream_t queue, cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal) {
    EXPECT_CUDA(cudaStreamBeginCapture(queue, mode));
  }
  static cudaGraph_t end(cudaStream_t queue) {
    cudaGraph_t graph = nullptr;
    EXPECT_CUDA(cudaStreamEndCapture(queue, &graph));
    return graph;
  }
  static cudaStreamCaptureStatus status(cudaStream_t queue) {
    cudaStreamCaptureStatus value = cudaStreamCaptureStatusNone;
    EXPECT_CUDA(cudaStreamIsCapturing(queue, &value));
    return value;
  }
  static void expect_invalid(cudaStream_t queue) {
    EXPECT_EQ(status(queue), cudaStreamCaptureStatusInvalidated);
    EXPECT_REFUSED(planted::launch_empty({1}, {1}, queue), cudaErrorStreamCaptureInvalidated,
                   "whose capture is invalid");
    cudaGraph_t graph = nullptr;
    EXPECT_REFUSED(cudaStreamEndCapture(queue, &graph), cudaErrorStreamCaptureInvalidated,
                   "got a capture that a call made invalid");
    EXPECT_EQ(graph, nullptr);
    EXPECT_EQ(status(queue), cudaStreamCaptureStatusNone);
  }
};

TEST_F(FakeCudaGraph, AReplayReadsWhatItsAddressesHoldThen) {
  for (const Policy policy : kPolicies) {
    start({.policy = policy});
    const cudaStream_t queue = stream();
    float* const source = pinned(kCount, 0.0f);
    float* const result = pinned(kCount, 0.0f);
    float* const weights = device(kCount);
    float* const middle = device(kCount);
    float* const out = device(kCount);
    copy(weights, pinned(kCount, 2.0f), kCount, queue);
    const cudaEvent_t inside = event();
    begin(queue);
    EXPECT_EQ(status(queue), cudaStreamCaptureStatusActive);
    copy(middle, source, kCount, queue);
    EXPECT_CUDA(cudaEventRecord(inside, queue));
    EXPECT_CUDA(cudaStreamWaitEvent(queue, inside, 0));
    EXPECT_CUDA(planted::launch_scale({weights, middle, out, kCount}, queue));
    EXPECT_CUDA(planted::launch_add_one({out, out, kCount}, true, queue));
    copy(result, out, kCount, queue);
    const cudaGraph_t graph = end(queue);
    EXPECT_CUDA(cudaDeviceSynchronize());
    EXPECT_EQ(result[0], 0.0f) << "recorded, not run";
    cudaGraphExec_t executable = nullptr;
    EXPECT_CUDA(cudaGraphInstantiate(&executable, graph, 0));
    EXPECT_CUDA(cudaGraphDestroy(graph));
    for (const float value : {1.0f, 5.0f, 7.0f}) {
      for (int i = 0; i < kCount; ++i) source[i] = value;
      EXPECT_CUDA(cudaGraphLaunch(executable, queue));
      EXPECT_CUDA(cudaStreamSynchronize(queue));
      for (int i = 0; i < kCount; ++i) ASSERT_EQ(result[i], 2.0f * value + 1.0f);
    }
    EXPECT_EQ(stats().graphs, 1);
    EXPECT_CUDA(cudaGraphExecDestroy(executable));
    EXPECT_EQ(stats().graphs, 0);
  }
}

TEST_F(FakeCudaGraph, TheDefaultStreamCannotBeCaptured) {
  EXPECT_REFUSED(cudaStreamBeginCapture(nullptr, cudaStreamCaptureModeGlobal),
                 cudaErrorStreamCaptureUnsupported, "expected a stream of your own");
}

TEST_F(FakeCudaGraph, WaitingForACapturingStreamEndsItsCapture) {
  const cudaStream_t queue = stream();
  begin(queue, cudaStreamCaptureModeRelaxed);
  EXPECT_REFUSED(cudaStreamSynchronize(queue), cudaErrorStreamCaptureUnsupported,
                 "the capture of stream 1 of cuda:0 is invalid");
  expect_invalid(queue);
  begin(queue, cudaStreamCaptureModeRelaxed);
  EXPECT_REFUSED(cudaStreamQuery(queue), cudaErrorStreamCaptureUnsupported, "got a query");
  expect_invalid(queue);
}

TEST_F(FakeCudaGraph, CallsThatMayWaitOrAllocateEndACaptureByItsMode) {
  const cudaStream_t queue = stream();
  void* memory = nullptr;
  begin(queue, cudaStreamCaptureModeGlobal);
  std::thread([&] {
    EXPECT_REFUSED(cudaMalloc(&memory, 4), cudaErrorStreamCaptureUnsupported,
                   "got the call on another thread of a capture");
  }).join();
  expect_invalid(queue);
  begin(queue, cudaStreamCaptureModeThreadLocal);
  std::thread([&] { EXPECT_CUDA(cudaMalloc(&memory, 4)); }).join();
  EXPECT_REFUSED(cudaMalloc(&memory, 4), cudaErrorStreamCaptureUnsupported,
                 "got the call on the thread of a capture");
  expect_invalid(queue);
  const cudaEvent_t mark = event();
  begin(queue, cudaStreamCaptureModeGlobal);
  EXPECT_REFUSED(cudaEventQuery(mark), cudaErrorStreamCaptureUnsupported, "cudaEventQuery");
  expect_invalid(queue);
  begin(queue, cudaStreamCaptureModeRelaxed);
  EXPECT_CUDA(cudaMalloc(&memory, 4));
  EXPECT_CUDA(cudaGraphDestroy(end(queue)));
}

TEST_F(FakeCudaGraph, AThreadMayTakeItselfOutOfTheCapturesOfOthers) {
  const cudaStream_t queue = stream();
  const cudaEvent_t mark = event();
  begin(queue, cudaStreamCaptureModeGlobal);
  std::thread([&] {
    for (const auto own : {cudaStreamCaptureModeThreadLocal, cudaStreamCaptureModeRelaxed}) {
      cudaStreamCaptureMode mode = own;
      EXPECT_CUDA(cudaThreadExchangeStreamCaptureMode(&mode));
      EXPECT_CUDA(cudaEventQuery(mark));
    }
    cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
    EXPECT_CUDA(cudaThreadExchangeStreamCaptureMode(&mode));
    EXPECT_EQ(mode, cudaStreamCaptureModeRelaxed) << "what it was comes back";
  }).join();
  EXPECT_EQ(status(queue), cudaStreamCaptureStatusActive);
  // Thread-local is of no use to the thread that captures; relaxed is.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  EXPECT_CUDA(cudaThreadExchangeStreamCaptureMode(&mode));
  EXPECT_CUDA(cudaEventQuery(mark));
  mode = cudaStreamCaptureModeThreadLocal;
  EXPECT_CUDA(cudaThreadExchangeStreamCaptureMode(&mode));
  EXPECT_REFUSED(cudaEventQuery(mark), cudaErrorStreamCaptureUnsupported, "cudaEventQuery");
  expect_invalid(queue);
}

TEST_F(FakeCudaGraph, PageableMemoryCannotBeCaptured) {
  std::vector<float> heap(10, 1.0f);
  float* const memory = device(10);
  const cudaStream_t queue = stream();
  begin(queue);
  EXPECT_REFUSED(cudaMemcpyAsync(memory, heap.data(), 40, cudaMemcpyHostToDevice, queue),
                 cudaErrorStreamCaptureUnsupported, "a copy with pageable memory");
  expect_invalid(queue);
}

TEST_F(FakeCudaGraph, EventsDoNotCrossTheBorderOfACapture) {
  const cudaStream_t queue = stream();
  const cudaStream_t other = stream();
  const cudaEvent_t outside = event();
  const cudaEvent_t inside = event();
  EXPECT_CUDA(cudaEventRecord(outside, other));
  begin(queue);
  EXPECT_REFUSED(cudaStreamWaitEvent(queue, outside, 0), cudaErrorStreamCaptureIsolation,
                 "expected both inside one capture");
  expect_invalid(queue);
  begin(queue);
  EXPECT_CUDA(cudaEventRecord(inside, queue));
  EXPECT_REFUSED(cudaStreamWaitEvent(other, inside, 0), cudaErrorStreamCaptureIsolation, "forks");
  expect_invalid(queue);
  begin(queue, cudaStreamCaptureModeRelaxed);
  EXPECT_CUDA(cudaEventRecord(inside, queue));
  EXPECT_CUDA(cudaGraphDestroy(end(queue)));
  EXPECT_REFUSED(cudaEventSynchronize(inside), cudaErrorCapturedEvent, "recorded in a capture");
  EXPECT_REFUSED(cudaStreamWaitEvent(other, inside, 0), cudaErrorStreamCaptureIsolation, "event");
  EXPECT_CUDA(cudaEventRecord(inside, other));
  EXPECT_CUDA(cudaEventSynchronize(inside)) << "recorded anew";
}

TEST_F(FakeCudaGraph, TheDefaultStreamEndsTheCaptureOfABlockingOne) {
  const cudaStream_t blocking = stream(cudaStreamDefault);
  EXPECT_NE(take_finding(), "");
  begin(blocking, cudaStreamCaptureModeRelaxed);
  EXPECT_REFUSED(planted::launch_empty({1}, {1}, nullptr), cudaErrorStreamCaptureImplicit,
                 "the default stream, which a captured blocking stream waits for");
  expect_invalid(blocking);
  const cudaStream_t queue = stream();
  begin(queue, cudaStreamCaptureModeRelaxed);
  EXPECT_CUDA(planted::launch_empty({1}, {1}, nullptr));
  EXPECT_CUDA(cudaGraphDestroy(end(queue)));
}

TEST_F(FakeCudaGraph, AGraphOutlivesNoMemory) {
  start({.policy = Policy::kLazy});
  const cudaStream_t queue = stream();
  float* const memory = device(10);
  float* const source = pinned(10, 1.0f);
  begin(queue, cudaStreamCaptureModeRelaxed);
  copy(memory, source, 10, queue);
  const cudaGraph_t graph = end(queue);
  cudaGraphExec_t executable = nullptr;
  EXPECT_CUDA(cudaGraphInstantiate(&executable, graph, 0));
  EXPECT_CUDA(cudaFree(memory));
  EXPECT_CUDA(cudaGraphLaunch(executable, queue));
  EXPECT_REFUSED(cudaStreamSynchronize(queue), cudaErrorIllegalAddress, "freed");
}

TEST_F(FakeCudaGraph, HandlesAreChecked) {
  const cudaStream_t queue = stream();
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  EXPECT_REFUSED(cudaStreamEndCapture(queue, &graph), cudaErrorIllegalState, "expected one that");
  EXPECT_REFUSED(cudaGraphInstantiate(&executable, nullptr, 0), cudaErrorInvalidValue,
                 "live graph");
  EXPECT_REFUSED(cudaGraphLaunch(nullptr, queue), cudaErrorInvalidValue, "live one");
  EXPECT_REFUSED(cudaGraphDestroy(nullptr), cudaErrorInvalidValue, "live one");
  EXPECT_REFUSED(cudaGraphExecDestroy(nullptr), cudaErrorInvalidValue, "live executable one");
  begin(queue, cudaStreamCaptureModeRelaxed);
  EXPECT_REFUSED(cudaStreamBeginCapture(queue, cudaStreamCaptureModeRelaxed), cudaErrorIllegalState,
                 "which captures");
  begin(stream(), cudaStreamCaptureModeRelaxed);
  EXPECT_CUDA(cudaGraphDestroy(end(queue)));
}

}  // namespace
}  // namespace fake
