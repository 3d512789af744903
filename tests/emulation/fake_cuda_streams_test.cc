#include <cmath>
#include <vector>

#include "tests/emulation/fake_cuda_fixture.h"

namespace fake {
namespace {

constexpr int kCount = 4000;  // four chunks
constexpr Policy kLatePolicies[] = {Policy::kLazy, Policy::kAhead, Policy::kRandom};

class FakeCudaStreams : public FakeCuda {};

TEST_F(FakeCudaStreams, EagerRunsWorkAtTheCallAndTheOthersDoNot) {
  for (const Policy policy : {Policy::kEager, Policy::kLazy, Policy::kAhead}) {
    start({.policy = policy});
    float* const result = pinned(kCount, 0.0f);
    copy(result, pinned(kCount, 3.0f), 0, nullptr);  // nothing, and fine
    float* const memory = device(kCount);
    const cudaStream_t queue = stream();
    copy(memory, pinned(kCount, 3.0f), kCount, queue);
    copy(result, memory, kCount, queue);
    EXPECT_EQ(result[0], policy == Policy::kEager ? 3.0f : 0.0f) << to_string(policy);
    EXPECT_EQ(stats().queued, policy == Policy::kEager ? 0 : 2);
    EXPECT_CUDA(cudaStreamSynchronize(queue));
    EXPECT_EQ(result[kCount - 1], 3.0f);
  }
}

TEST_F(FakeCudaStreams, TheTargetOfACopyIsPoisonUntilEachChunkHasLanded) {
  start({.policy = Policy::kLazy});
  float* const memory = device(kCount);
  float* const result = pinned(kCount, 5.0f);
  const cudaStream_t queue = stream();
  const cudaEvent_t done = event();
  copy(memory, pinned(kCount, 3.0f), kCount, queue);
  EXPECT_CUDA(cudaStreamSynchronize(queue));
  copy(result, memory, kCount, queue);
  EXPECT_CUDA(cudaEventRecord(done, queue));
  EXPECT_EQ(result[0], 5.0f) << "not begun";
  EXPECT_EQ(cudaEventQuery(done), cudaErrorNotReady);
  for (int i = 0; i < kCount; ++i) ASSERT_TRUE(std::isnan(result[i])) << i;
  EXPECT_EQ(cudaEventQuery(done), cudaErrorNotReady);
  int landed = 0;
  for (int i = 0; i < kCount; ++i) landed += result[i] == 3.0f ? 1 : 0;
  EXPECT_GE(landed, kCount - 3 * 1024);
  EXPECT_LE(landed, 1024) << "one chunk a step";
}

TEST_F(FakeCudaStreams, ChunksLandInAnyOrder) {
  int first_was_last = 0;
  for (std::uint64_t seed = 1; seed <= 32; ++seed) {
    start({.policy = Policy::kLazy, .seed = seed});
    float* const result = pinned(kCount, 0.0f);
    float* const memory = device(kCount);
    const cudaEvent_t done = event();
    copy(memory, pinned(kCount, 3.0f), kCount, nullptr);
    EXPECT_CUDA(cudaStreamSynchronize(nullptr));
    copy(result, memory, kCount, nullptr);
    EXPECT_CUDA(cudaEventRecord(done, nullptr));
    for (int step = 0; step < 4; ++step) EXPECT_EQ(cudaEventQuery(done), cudaErrorNotReady);
    first_was_last += std::isnan(result[0]) ? 1 : 0;
  }
  EXPECT_GT(first_was_last, 2);
  EXPECT_LT(first_was_last, 30);
}

TEST_F(FakeCudaStreams, SameSeedSameInterleaving) {
  const auto run = [this](std::uint64_t seed) {
    start({.policy = Policy::kRandom, .seed = seed});
    std::vector<std::uint64_t> steps;
    float* const memory = device(kCount);
    float* const other = device(kCount);
    const cudaStream_t streams[] = {stream(), stream()};
    for (int i = 0; i < 10; ++i) {
      copy(i % 2 == 0 ? memory : other, pinned(kCount, 1.0f), kCount, streams[i % 2]);
      steps.push_back(stats().steps);
    }
    EXPECT_CUDA(cudaDeviceSynchronize());
    return steps;
  };
  EXPECT_EQ(run(3), run(3));
  EXPECT_NE(run(3), run(4));
}

TEST_F(FakeCudaStreams, PageableMemoryIsReadAtTheCallAndCounted) {
  for (const Policy policy : kLatePolicies) {
    start({.policy = policy});
    std::vector<float> heap(kCount, 1.0f);
    float* const memory = device(kCount);
    const cudaStream_t queue = stream();
    const std::size_t mark = num_calls();
    copy(memory, heap.data(), kCount, queue);
    EXPECT_TRUE(host_waits_since(mark).empty());
    heap.assign(kCount, 9.0f);
    copy(heap.data(), memory, kCount, queue);
    EXPECT_EQ(heap[kCount - 1], 1.0f) << "the call returned behind the copy";
    EXPECT_EQ(host_waits_since(mark).size(), 1u);
    EXPECT_EQ(stats().pageable_copies, 2u);
  }
}

TEST_F(FakeCudaStreams, FillsWriteEveryByte) {
  float* const memory = device(kCount);
  float* const result = pinned(kCount, 1.0f);
  EXPECT_CUDA(cudaMemsetAsync(memory, 0, kCount * sizeof(float), nullptr));
  copy(result, memory, kCount, nullptr);
  EXPECT_CUDA(cudaStreamSynchronize(nullptr));
  for (int i = 0; i < kCount; ++i) ASSERT_EQ(result[i], 0.0f);
  float heap = 0.0f;
  EXPECT_REFUSED(cudaMemsetAsync(&heap, 0, 4, nullptr), cudaErrorInvalidValue, "pageable memory");
}

TEST_F(FakeCudaStreams, AWaitForAnEventThatWasNeverRecordedIsNone) {
  for (const Policy policy : kLatePolicies) {
    start({.policy = policy});
    const cudaEvent_t never = event();
    float* const memory = device(10);
    EXPECT_CUDA(cudaStreamWaitEvent(nullptr, never, 0));
    EXPECT_CUDA(cudaEventQuery(never));
    EXPECT_CUDA(cudaEventSynchronize(never));
    copy(memory, pinned(10, 1.0f), 10, nullptr);
    EXPECT_CUDA(cudaStreamSynchronize(nullptr));
  }
}

TEST_F(FakeCudaStreams, AWaitKeepsTheRecordThatTheEventHadAtTheCall) {
  start({.policy = Policy::kAhead});
  const cudaEvent_t reused = event();
  float* const slow = device(kCount);
  float* const result = pinned(kCount, 0.0f);
  float* const memory = device(kCount);
  const cudaStream_t first = stream();
  const cudaStream_t second = stream();
  const cudaStream_t third = stream();
  copy(memory, pinned(kCount, 1.0f), kCount, first);
  EXPECT_CUDA(cudaEventRecord(reused, first));
  EXPECT_CUDA(cudaStreamWaitEvent(second, reused, 0));
  // Recorded anew, elsewhere, behind work that is long: the wait above does not move.
  copy(slow, pinned(kCount, 1.0f), kCount, third);
  EXPECT_CUDA(cudaEventRecord(reused, third));
  copy(result, memory, kCount, second);
  EXPECT_CUDA(cudaStreamSynchronize(second));
  EXPECT_EQ(result[kCount - 1], 1.0f);
  // The other way round: what is waited for now is the newest one alone.
  EXPECT_CUDA(cudaEventSynchronize(reused));
  EXPECT_CUDA(cudaStreamQuery(third));
}

TEST_F(FakeCudaStreams, AnEventHoldsBackAnotherStreamUnderEveryPolicy) {
  for (const Policy policy : kLatePolicies) {
    for (std::uint64_t seed = 1; seed <= 20; ++seed) {
      start({.policy = policy, .seed = seed});
      const cudaEvent_t ready = event();
      float* const memory = device(kCount);
      float* const result = pinned(kCount, 0.0f);
      const cudaStream_t writer = stream();
      const cudaStream_t reader = stream();
      copy(memory, pinned(kCount, 1.0f), kCount, writer);
      EXPECT_CUDA(cudaEventRecord(ready, writer));
      EXPECT_CUDA(cudaStreamWaitEvent(reader, ready, 0));
      EXPECT_CUDA(cudaEventDestroy(ready)) << "queued waits stand";
      copy(result, memory, kCount, reader);
      EXPECT_CUDA(cudaStreamSynchronize(reader));
      for (int i = 0; i < kCount; ++i) ASSERT_EQ(result[i], 1.0f) << to_string(policy) << seed;
    }
  }
}

// Whether `second`'s copy saw what `first` wrote, with nothing but CUDA's own order between them.
bool ordered(Policy policy, std::uint64_t seed, unsigned flags, bool default_first) {
  reset({.policy = policy, .seed = seed});
  void* memory = nullptr;
  void* host = nullptr;
  void* result = nullptr;
  cudaStream_t other = nullptr;
  EXPECT_CUDA(cudaMalloc(&memory, 4 * kCount));
  EXPECT_CUDA(cudaHostAlloc(&host, 4 * kCount, 0));
  EXPECT_CUDA(cudaHostAlloc(&result, 4 * kCount, 0));
  for (int i = 0; i < kCount; ++i) static_cast<float*>(host)[i] = 1.0f;
  EXPECT_CUDA(cudaStreamCreateWithFlags(&other, flags));
  const cudaStream_t first = default_first ? nullptr : other;
  const cudaStream_t second = default_first ? other : nullptr;
  EXPECT_CUDA(cudaMemcpyAsync(memory, host, 4 * kCount, cudaMemcpyHostToDevice, first));
  EXPECT_CUDA(cudaMemcpyAsync(result, memory, 4 * kCount, cudaMemcpyDeviceToHost, second));
  EXPECT_CUDA(cudaStreamSynchronize(second));
  for (int i = 0; i < kCount; ++i) {
    if (static_cast<float*>(result)[i] != 1.0f) return false;
  }
  return true;
}

TEST_F(FakeCudaStreams, BlockingStreamsKeepTheDefaultStreamsOrderAndOthersDoNot) {
  for (const bool default_first : {true, false}) {
    int num_unordered = 0;
    for (const Policy policy : kLatePolicies) {
      for (std::uint64_t seed = 1; seed <= 10; ++seed) {
        EXPECT_TRUE(ordered(policy, seed, cudaStreamDefault, default_first)) << to_string(policy);
        EXPECT_NE(take_finding().find("got a blocking stream, expected cudaStreamNonBlocking"),
                  std::string::npos);
        EXPECT_EQ(stats().blocking_streams, 1);
        num_unordered += ordered(policy, seed, cudaStreamNonBlocking, default_first) ? 0 : 1;
        EXPECT_EQ(stats().blocking_streams, 0);
      }
    }
    EXPECT_GE(num_unordered, 10) << "always under lazy";
  }
}

TEST_F(FakeCudaStreams, AHostThatPollsSeesTheEnd) {
  for (const Policy policy : kLatePolicies) {
    start({.policy = policy, .chunk_bytes = 64});  // 250 steps
    const cudaEvent_t done = event();
    float* const memory = device(kCount);
    const cudaStream_t queue = stream();
    copy(memory, pinned(kCount, 1.0f), kCount, queue);
    EXPECT_CUDA(cudaEventRecord(done, queue));
    int num_unanswered = 0;
    while (cudaEventQuery(done) == cudaErrorNotReady) ++num_unanswered;
    EXPECT_EQ(num_unanswered, 8) << to_string(policy);
    EXPECT_CUDA(cudaStreamQuery(queue));
    copy(memory, pinned(kCount, 1.0f), kCount, queue);
    num_unanswered = 0;
    while (cudaStreamQuery(queue) == cudaErrorNotReady) ++num_unanswered;
    EXPECT_EQ(num_unanswered, 8) << to_string(policy);
  }
}

TEST_F(FakeCudaStreams, SynchronizingAStreamWaitsForThatStreamUnderLazy) {
  start({.policy = Policy::kLazy});
  float* const memory = device(kCount);
  float* const other = device(kCount);
  const cudaStream_t first = stream();
  const cudaStream_t second = stream();
  copy(memory, pinned(kCount, 1.0f), kCount, first);
  copy(other, pinned(kCount, 1.0f), kCount, second);
  EXPECT_CUDA(cudaStreamSynchronize(first));
  EXPECT_EQ(stats().queued, 1);
  EXPECT_CUDA(cudaDeviceSynchronize());
  EXPECT_EQ(stats().queued, 0);
}

TEST_F(FakeCudaStreams, ADestroyedStreamFinishesItsWorkAndItsHandleIsDead) {
  start({.policy = Policy::kLazy});
  float* const memory = device(kCount);
  float* const result = pinned(kCount, 0.0f);
  const cudaStream_t queue = stream();
  copy(memory, pinned(kCount, 1.0f), kCount, queue);
  copy(result, memory, kCount, queue);
  EXPECT_CUDA(cudaStreamDestroy(queue));
  EXPECT_EQ(stats().streams, 0);
  EXPECT_REFUSED(cudaStreamSynchronize(queue), cudaErrorInvalidResourceHandle,
                 "expected one that was created and not destroyed since");
  EXPECT_CUDA(cudaDeviceSynchronize());
  EXPECT_EQ(result[0], 1.0f);
  const cudaEvent_t gone = event();
  EXPECT_CUDA(cudaEventDestroy(gone));
  EXPECT_REFUSED(cudaEventRecord(gone, nullptr), cudaErrorInvalidResourceHandle, "got event");
  EXPECT_REFUSED(cudaStreamDestroy(nullptr), cudaErrorInvalidResourceHandle, "default stream");
}

TEST_F(FakeCudaStreams, HandlesOfAnEarlierRunAreRefused) {
  const cudaStream_t queue = stream();
  const cudaEvent_t mark = event();
  start({});
  EXPECT_REFUSED(cudaStreamQuery(queue), cudaErrorInvalidResourceHandle, "got stream");
  EXPECT_REFUSED(cudaEventQuery(mark), cudaErrorInvalidResourceHandle, "got event");
}

TEST_F(FakeCudaStreams, TimeIsVirtual) {
  const cudaEvent_t before = event(cudaEventDefault);
  const cudaEvent_t after = event(cudaEventDefault);
  const cudaEvent_t untimed = event();
  float* const memory = device(kCount);
  float milliseconds = 0.0f;
  EXPECT_REFUSED(cudaEventElapsedTime(&milliseconds, before, after), cudaErrorInvalidResourceHandle,
                 "made with timing and recorded");
  EXPECT_CUDA(cudaEventRecord(before, nullptr));
  copy(memory, pinned(kCount, 1.0f), kCount, nullptr);
  EXPECT_CUDA(cudaEventRecord(after, nullptr));
  EXPECT_CUDA(cudaEventRecord(untimed, nullptr));
  EXPECT_CUDA(cudaEventSynchronize(untimed));
  EXPECT_CUDA(cudaEventElapsedTime(&milliseconds, before, after));
  EXPECT_FLOAT_EQ(milliseconds, 0.006f) << "poison, four chunks and the record, a microsecond each";
  EXPECT_REFUSED(cudaEventElapsedTime(&milliseconds, before, untimed),
                 cudaErrorInvalidResourceHandle, "made with timing");
}

TEST_F(FakeCudaStreams, HostFunctionsRunInOrderAndMayCallNothing) {
  for (const Policy policy : {Policy::kEager, Policy::kLazy, Policy::kAhead, Policy::kRandom}) {
    start({.policy = policy});
    struct Seen {
      float* result;
      float value = 0.0f;
      cudaError_t code = cudaSuccess;
    } seen = {.result = pinned(kCount, 0.0f)};
    float* const memory = device(kCount);
    copy(memory, pinned(kCount, 1.0f), kCount, nullptr);
    copy(seen.result, memory, kCount, nullptr);
    EXPECT_CUDA(cudaLaunchHostFunc(
        nullptr,
        [](void* data) {
          auto* const what = static_cast<Seen*>(data);
          what->value = what->result[kCount - 1];
          what->code = cudaDeviceSynchronize();
        },
        &seen));
    EXPECT_CUDA(cudaStreamSynchronize(nullptr));
    EXPECT_EQ(seen.value, 1.0f);
    EXPECT_EQ(seen.code, cudaErrorNotPermitted);
    (void)cudaGetLastError();
  }
}

TEST_F(FakeCudaStreams, HostFunctionsFindDeviceMemoryClosed) {
  const auto touch = [](void* data) { *static_cast<float*>(data) = 1.0f; };
  EXPECT_EXIT(
      {
        start({.policy = Policy::kLazy});
        (void)cudaLaunchHostFunc(nullptr, touch, device(10));
        (void)cudaDeviceSynchronize();
      },
      testing::ExitedWithCode(87), "HOST CODE touches device memory: .*cuda:0 allocation 1");
}

TEST_F(FakeCudaStreams, PrioritiesAreGivenAndMeant) {
  start({.num_priorities = 3});
  int least = 1;
  int greatest = 1;
  EXPECT_CUDA(cudaDeviceGetStreamPriorityRange(&least, &greatest));
  EXPECT_EQ(least, 0);
  EXPECT_EQ(greatest, -2);
  cudaStream_t queue = nullptr;
  EXPECT_CUDA(cudaStreamCreateWithPriority(&queue, cudaStreamNonBlocking, greatest));
  EXPECT_TRUE(findings().empty());
  EXPECT_CUDA(cudaStreamCreateWithPriority(&queue, cudaStreamNonBlocking, -3));
  EXPECT_NE(take_finding().find("got priority -3, expected one between 0 and -2"),
            std::string::npos);
}

TEST_F(FakeCudaStreams, TheLogTellsWhereTheHostWaited) {
  const cudaStream_t queue = stream();
  const cudaEvent_t mark = event();
  EXPECT_CUDA(cudaStreamSynchronize(queue));
  const std::size_t from = num_calls();
  EXPECT_CUDA(cudaEventRecord(mark, queue));
  EXPECT_CUDA(cudaStreamWaitEvent(queue, mark, 0));
  (void)cudaEventQuery(mark);
  EXPECT_TRUE(host_waits_since(from).empty());
  const std::vector<Call> log = call_log();
  ASSERT_EQ(log.size(), from + 3);
  EXPECT_EQ(log[from].api, Api::kEventRecord);
  EXPECT_EQ(log[from].stream, queue);
  EXPECT_STREQ(name(log[from + 1].api), "cudaStreamWaitEvent");
  EXPECT_EQ(log[from].thread, log[0].thread);
  EXPECT_CUDA(cudaEventSynchronize(mark));
  ASSERT_EQ(host_waits_since(from).size(), 1u);
  EXPECT_EQ(host_waits_since(from)[0].find("cudaEventSynchronize on thread "), 0u);
}

}  // namespace
}  // namespace fake
