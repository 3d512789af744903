#include <atomic>
#include <cmath>
#include <thread>

#include "tests/emulation/fake_cuda_fixture.h"
#include "tests/emulation/planted/streams.h"

namespace fake {
namespace {

constexpr Policy kPolicies[] = {Policy::kEager, Policy::kLazy, Policy::kAhead, Policy::kRandom};
constexpr int kCount = 3000;

class FakeCudaLaunch : public FakeCuda {
 protected:
  static int num_calls_of(Api api, std::size_t from) {
    int count = 0;
    const std::vector<Call> log = call_log();
    for (std::size_t i = from; i < log.size(); ++i) count += log[i].api == api ? 1 : 0;
    return count;
  }
  /// Device memory with `value` in it, there already.
  static float* filled(int count, float value) {
    float* const memory = device(count);
    const Peek peek;
    for (int i = 0; i < count; ++i) memory[i] = value;
    simt::mark_defined(memory, static_cast<std::size_t>(count) * sizeof(float));
    return memory;
  }
  static std::uint32_t* pinned_flag() {
    void* memory = nullptr;
    EXPECT_CUDA(cudaHostAlloc(&memory, 64, 0));
    auto* const flag = static_cast<std::uint32_t*>(memory);
    *flag = 0;
    return flag;
  }
};

TEST_F(FakeCudaLaunch, AKernelReadsItsArgumentsAsTheyWereAtTheCall) {
  for (const Policy policy : kPolicies) {
    start({.policy = policy});
    float* const out = device(kCount);
    float* const result = pinned(kCount, 0.0f);
    planted::ScaleParameters parameters = {filled(kCount, 2.0f), filled(kCount, 3.0f), out, kCount};
    EXPECT_CUDA(planted::launch_scale(parameters, nullptr));
    parameters = {};
    copy(result, out, kCount, nullptr);
    EXPECT_CUDA(cudaStreamSynchronize(nullptr));
    for (int i = 0; i < kCount; ++i) ASSERT_EQ(result[i], 6.0f);
    EXPECT_EQ(stats().launches, 1u);
  }
}

TEST_F(FakeCudaLaunch, BadShapesAreRefusedAtTheCall) {
  for (const auto& [grid, block] : {std::pair<dim3, dim3>{{0}, {1}},
                                    {{1}, {0}},
                                    {{1}, {1025}},
                                    {{1}, {32, 33}},
                                    {{1}, {1, 1, 65}},
                                    {{1, 65536}, {1}},
                                    {{1, 1, 65536}, {1}}}) {
    EXPECT_REFUSED(planted::launch_empty(grid, block, nullptr), cudaErrorInvalidConfiguration,
                   "cudaLaunchKernel: kernel empty: got grid (");
  }
  EXPECT_CUDA(planted::launch_empty({2, 3, 4}, {8, 8, 16}, nullptr));
  EXPECT_CUDA(cudaDeviceSynchronize());
  EXPECT_EQ(stats().launches, 1u);
}

TEST_F(FakeCudaLaunch, SharedMemoryIsAskedForOnce) {
  float* const out = device(1);
  float* const result = pinned(1, 0.0f);
  const auto run = [&](std::size_t bytes) {
    const std::size_t mark = num_calls();
    EXPECT_CUDA(planted::launch_through_shared(out, bytes, nullptr));
    copy(result, out, 1, nullptr);
    EXPECT_CUDA(cudaStreamSynchronize(nullptr));
    EXPECT_EQ(result[0], static_cast<float>(bytes / sizeof(float)));
    return num_calls_of(Api::kFuncSetAttribute, mark);
  };
  EXPECT_EQ(run(16 * 1024), 1) << "48 KiB would hold the kernel's static memory too";
  EXPECT_EQ(run(8 * 1024), 0);
  EXPECT_EQ(run(60'000), 1);
  EXPECT_EQ(run(60'000), 0);
  EXPECT_EQ(run(100'000), 1);
  EXPECT_EQ(run(60'000), 0) << "the larger grant stands";
  start({.model = {.shared_bytes_per_block_optin = 50'000}});
  EXPECT_REFUSED(planted::launch_through_shared(device(1), 60'000, nullptr), cudaErrorInvalidValue,
                 "kernel through_shared: got 60000 bytes of dynamic shared memory, expected at "
                 "most 50000");
  start({});
  EXPECT_REFUSED(planted::launch_through_shared(device(1), 228 * 1024, nullptr),
                 cudaErrorInvalidValue,
                 "got 233472 bytes of dynamic shared memory, expected at most");
}

TEST_F(FakeCudaLaunch, ALaunchGoesToAStreamOfTheCurrentDevice) {
  start({.num_devices = 2});
  const cudaStream_t here = stream();
  EXPECT_CUDA(cudaSetDevice(1));
  EXPECT_REFUSED(planted::launch_empty({1}, {1}, here), cudaErrorInvalidResourceHandle,
                 "got stream 1 of cuda:0, expected one of the current device 1");
}

TEST_F(FakeCudaLaunch, AKernelMayNotTouchAnotherDevicesMemory) {
  start({.num_devices = 2});
  float* const here = filled(kCount, 1.0f);
  EXPECT_CUDA(cudaSetDevice(1));
  float* const there = device(kCount);
  float* const its_own = filled(kCount, 1.0f);
  EXPECT_CUDA(planted::launch_add_one({its_own, there, kCount}, true, nullptr));
  EXPECT_CUDA(cudaDeviceSynchronize());
  EXPECT_CUDA(planted::launch_add_one({here, there, kCount}, true, nullptr));
  EXPECT_REFUSED(cudaDeviceSynchronize(), cudaErrorIllegalAddress, "cuda:0 allocation 1");
  EXPECT_NE(last_failure().find("add_one block"), std::string::npos) << last_failure();
  EXPECT_CUDA(cudaSetDevice(0));
  EXPECT_CUDA(cudaDeviceSynchronize()) << "the other device is well";
}

TEST_F(FakeCudaLaunch, WhatAKernelDoesWrongIsToldByTheNextCallsAndStays) {
  for (const Policy policy : kPolicies) {
    start({.policy = policy});
    float* const memory = device(kCount);
    const cudaStream_t queue = stream();
    const cudaEvent_t mark = event();
    EXPECT_CUDA(cudaFree(memory));
    EXPECT_CUDA(planted::launch_add_one({memory, memory, kCount}, true, queue))
        << "a launch does not tell its own end: " << to_string(policy);
    (void)cudaEventRecord(mark, queue);
    EXPECT_REFUSED(cudaStreamSynchronize(queue), cudaErrorIllegalAddress, "(freed)");
    EXPECT_EQ(stats().queued, 0);
    void* more = nullptr;
    EXPECT_EQ(cudaMalloc(&more, 4), cudaErrorIllegalAddress);
    EXPECT_EQ(cudaEventQuery(mark), cudaErrorIllegalAddress);
    EXPECT_EQ(planted::launch_empty({1}, {1}, queue), cudaErrorIllegalAddress);
    EXPECT_EQ(cudaGetLastError(), cudaErrorIllegalAddress);
    EXPECT_EQ(cudaGetLastError(), cudaErrorIllegalAddress) << "it does not go away";
    EXPECT_EQ(cudaStreamDestroy(queue), cudaErrorIllegalAddress);
    EXPECT_EQ(cudaEventDestroy(mark), cudaErrorIllegalAddress);
    EXPECT_EQ(stats().streams + stats().events, 0) << "given back all the same";
  }
}

// The number of grids that began early in a chain scale, add_one.
std::uint64_t chain(bool event_between, cudaStream_t stream, cudaEvent_t event,
                    const planted::ScaleParameters& scale, float* out) {
  const std::uint64_t before = stats().early_prologues;
  EXPECT_CUDA(planted::launch_scale(scale, stream));
  if (event_between) {
    EXPECT_CUDA(cudaEventRecord(event, stream));
  }
  EXPECT_CUDA(planted::launch_add_one({scale.out, out, kCount}, true, stream));
  EXPECT_CUDA(cudaStreamSynchronize(stream));
  return stats().early_prologues - before;
}

TEST_F(FakeCudaLaunch, ADependentGridBeginsBeforeTheOneAheadEndsUnlessSomethingLiesBetween) {
  for (const Policy policy : {Policy::kLazy, Policy::kAhead}) {
    start({.policy = policy});
    float* const middle = device(kCount);
    float* const out = device(kCount);
    const planted::ScaleParameters scale = {filled(kCount, 2.0f), filled(kCount, 3.0f), middle,
                                            kCount};
    const cudaEvent_t between = event();
    EXPECT_EQ(chain(false, nullptr, between, scale, out), 1u);
    const cudaStream_t queue = stream();
    EXPECT_EQ(chain(false, queue, between, scale, out), 1u);
    EXPECT_EQ(chain(true, queue, between, scale, out), 0u);
    const Peek peek;
    for (int i = 0; i < kCount; ++i) ASSERT_EQ(out[i], 7.0f);
  }
  std::uint64_t num_early = 0;
  for (std::uint64_t seed = 1; seed <= 20; ++seed) {
    start({.policy = Policy::kRandom, .seed = seed});
    const planted::ScaleParameters scale = {filled(kCount, 2.0f), filled(kCount, 3.0f),
                                            device(kCount), kCount};
    num_early += chain(false, nullptr, nullptr, scale, device(kCount));
  }
  EXPECT_GT(num_early, 2u);
  EXPECT_LT(num_early, 18u) << "both ways happen";
}

TEST_F(FakeCudaLaunch, DependentLaunchesNeedSm90) {
  start({.model = {.compute_major = 8}});
  float* const memory = filled(kCount, 1.0f);
  EXPECT_REFUSED(planted::launch_add_one({memory, memory, kCount}, true, nullptr),
                 cudaErrorNotSupported,
                 "kernel add_one: got a dependent launch of code for sm_80 on sm_80");
}

TEST_F(FakeCudaLaunch, CopiesRunBetweenTheBatchesOfAGrid) {
  int num_mixed = 0;
  for (std::uint64_t seed = 1; seed <= 20; ++seed) {
    start({.policy = Policy::kRandom, .seed = seed});
    float* const source = pinned(kCount, 1.0f);
    float* const memory = filled(kCount, 2.0f);
    float* const out = device(kCount);
    // In no order with each other: the kernel reads some of the old and some of the new.
    EXPECT_CUDA(planted::launch_add_one({memory, out, kCount}, true, stream(), 40));
    copy(memory, source, kCount, stream());
    if (cudaDeviceSynchronize() != cudaSuccess) {
      // A build that looks at accesses says what the other one only computes with.
      EXPECT_TRUE(simt::checked());
      EXPECT_NE(last_failure().find("uninitialised"), std::string::npos) << last_failure();
      ++num_mixed;
      continue;
    }
    const Peek peek;
    bool old_seen = false;
    bool other_seen = false;
    for (int i = 0; i < kCount; ++i) {
      old_seen |= out[i] == 3.0f;
      other_seen |= out[i] != 3.0f;
    }
    num_mixed += old_seen && other_seen ? 1 : 0;
  }
  EXPECT_GT(num_mixed, 1);
}

TEST_F(FakeCudaLaunch, AKernelThatPollsIsAnsweredByAnotherStream) {
  for (const Policy policy : kPolicies) {
    start({.policy = policy});
    std::uint32_t* const flag = pinned_flag();
    float* const out = device(1);
    const cudaStream_t polling = stream();
    EXPECT_CUDA(planted::launch_poll({flag, out}, polling));
    EXPECT_CUDA(planted::launch_raise(flag, 1, stream()));
    EXPECT_CUDA(cudaStreamSynchronize(polling)) << to_string(policy);
    const Peek peek;
    EXPECT_EQ(out[0], 1.0f);
  }
}

TEST_F(FakeCudaLaunch, AKernelThatNobodyAnswersIsNoHang) {
  for (const Policy policy : kPolicies) {
    start({.policy = policy});
    const cudaStream_t polling = stream();
    EXPECT_CUDA(planted::launch_poll({pinned_flag(), device(1)}, polling));
    EXPECT_REFUSED(cudaStreamSynchronize(polling), cudaErrorLaunchTimeout,
                   "the device waits for the host: every block of kernel poll on stream 1 of "
                   "cuda:0 polls memory that nobody writes");
  }
}

TEST_F(FakeCudaLaunch, AKernelThatPollsIsAnsweredByAHostThread) {
  for (const Policy policy : kPolicies) {
    start({.policy = policy, .patience = std::chrono::minutes(4)});
    std::uint32_t* const flag = pinned_flag();
    float* const out = device(1);
    const cudaStream_t polling = stream();
    std::atomic<bool> known = false;
    std::thread answer([&] {
      EXPECT_CUDA(cudaSetDevice(0));  // from now on the runtime knows of this thread
      known = true;
      while (stats().steps < 10) std::this_thread::yield();
      std::atomic_ref<std::uint32_t>(*flag).store(1, std::memory_order_release);
    });
    while (!known) std::this_thread::yield();
    EXPECT_CUDA(planted::launch_poll({flag, out}, polling));
    EXPECT_CUDA(cudaStreamSynchronize(polling)) << to_string(policy);
    answer.join();
  }
}

}  // namespace
}  // namespace fake
