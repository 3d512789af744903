// Several host threads in the runtime at once; the thread sanitizer watches these.
#include <array>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "tests/emulation/fake_cuda_fixture.h"
#include "tests/emulation/planted/streams.h"

namespace fake {
namespace {

constexpr Policy kPolicies[] = {Policy::kEager, Policy::kLazy, Policy::kAhead, Policy::kRandom};
constexpr int kCount = 2000;

class FakeCudaThreads : public FakeCuda {};

TEST_F(FakeCudaThreads, ThreadsWithStreamsOfTheirOwnGetTheirOwnResults) {
  for (const Policy policy : kPolicies) {
    start({.policy = policy});
    std::vector<std::thread> threads;
    for (int t = 0; t < 4; ++t) {
      threads.emplace_back([t] {
        for (int round = 0; round < 5; ++round) {
          const cudaStream_t queue = stream();
          const float value = static_cast<float>(10 * t + round);
          float* const source = pinned(kCount, value);
          float* const memory = device(kCount);
          float* const result = pinned(kCount, 0.0f);
          copy(memory, source, kCount, queue);
          EXPECT_CUDA(planted::launch_add_one({memory, memory, kCount}, true, queue));
          copy(result, memory, kCount, queue);
          EXPECT_CUDA(cudaStreamSynchronize(queue));
          for (int i = 0; i < kCount; ++i) ASSERT_EQ(result[i], value + 1.0f);
          EXPECT_CUDA(cudaFree(memory));
          EXPECT_CUDA(cudaFreeHost(source));
          EXPECT_CUDA(cudaFreeHost(result));
          EXPECT_CUDA(cudaStreamDestroy(queue));
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(stats().device_allocations + stats().pinned_allocations + stats().streams, 0);
    EXPECT_EQ(stats().launches, 20u);
  }
}

// The tier's shape: a thread submits copies and polls their events, the caller computes on its own
// stream and waits on the host for neither.
TEST_F(FakeCudaThreads, ATransferThreadFeedsTheCaller) {
  for (const Policy policy : kPolicies) {
    for (std::uint64_t seed = 1; seed <= 3; ++seed) {
      start({.policy = policy, .seed = seed});
      constexpr int kExperts = 6;
      const cudaStream_t copies = stream();
      const cudaStream_t compute = stream();
      float* const source = pinned(kExperts * kCount, 0.0f);
      for (int e = 0; e < kExperts; ++e) {
        for (int i = 0; i < kCount; ++i) source[e * kCount + i] = static_cast<float>(e);
      }
      float* const slots = device(kExperts * kCount);
      float* const out = device(kExperts * kCount);
      float* const result = pinned(kExperts * kCount, -1.0f);
      std::array<cudaEvent_t, kExperts> ready = {};
      for (cudaEvent_t& one : ready) one = event();
      std::mutex mutex;
      std::condition_variable submitted;
      int num_submitted = 0;

      std::thread transfer([&] {
        for (int e = 0; e < kExperts; ++e) {
          copy(slots + e * kCount, source + e * kCount, kCount, copies);
          EXPECT_CUDA(cudaEventRecord(ready[e], copies));
          {
            const std::lock_guard<std::mutex> lock(mutex);
            ++num_submitted;
          }
          submitted.notify_one();
        }
        while (cudaEventQuery(ready[kExperts - 1]) == cudaErrorNotReady) std::this_thread::yield();
      });
      for (int e = 0; e < kExperts; ++e) {
        {
          std::unique_lock<std::mutex> lock(mutex);
          submitted.wait(lock, [&] { return num_submitted > e; });
        }
        EXPECT_CUDA(cudaStreamWaitEvent(compute, ready[e], 0));
        EXPECT_CUDA(
            planted::launch_add_one({slots + e * kCount, out + e * kCount, kCount}, true, compute));
      }
      copy(result, out, kExperts * kCount, compute);
      EXPECT_CUDA(cudaStreamSynchronize(compute));
      transfer.join();
      for (int e = 0; e < kExperts; ++e) {
        for (int i = 0; i < kCount; ++i) {
          ASSERT_EQ(result[e * kCount + i], static_cast<float>(e + 1)) << to_string(policy);
        }
      }
    }
  }
}

TEST_F(FakeCudaThreads, ALostDeviceWakesWhoeverWaits) {
  start({.policy = Policy::kRandom, .chunk_bytes = 64, .patience = std::chrono::minutes(4)});
  std::atomic<int> num_told = 0;
  std::vector<std::thread> threads;
  float* const memory = device(kCount);
  float* const source = pinned(kCount, 1.0f);
  fault_after_steps(200, cudaErrorLaunchFailure);
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([&] {
      cudaStream_t queue = nullptr;
      (void)cudaStreamCreateWithFlags(&queue, cudaStreamNonBlocking);
      cudaError_t code = cudaSuccess;
      while (code == cudaSuccess) {
        code = cudaMemcpyAsync(memory, source, kCount * sizeof(float), cudaMemcpyDefault, queue);
        if (code == cudaSuccess) code = cudaStreamSynchronize(queue);
      }
      num_told += code == cudaErrorLaunchFailure ? 1 : 0;
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(num_told, 3);
}

TEST_F(FakeCudaThreads, AHostFunctionRunsBesideTheCallsOfOthers) {
  for (const Policy policy : kPolicies) {
    start({.policy = policy});
    std::atomic<bool> entered = false;
    std::atomic<bool> let_go = false;
    struct Gate {
      std::atomic<bool>* entered;
      std::atomic<bool>* let_go;
    } gate = {&entered, &let_go};
    const cudaStream_t queue = stream();
    std::thread waiter([&] {
      EXPECT_CUDA(cudaLaunchHostFunc(
          queue,
          [](void* data) {
            *static_cast<Gate*>(data)->entered = true;
            while (!*static_cast<Gate*>(data)->let_go) std::this_thread::yield();
          },
          &gate));
      EXPECT_CUDA(cudaStreamSynchronize(queue));
    });
    while (!entered) std::this_thread::yield();
    // The function holds its stream and nothing else.
    float* const memory = device(kCount);
    float* const result = pinned(kCount, 0.0f);
    const cudaStream_t other = stream();
    copy(memory, pinned(kCount, 3.0f), kCount, other);
    copy(result, memory, kCount, other);
    EXPECT_CUDA(cudaStreamSynchronize(other));
    EXPECT_EQ(result[kCount - 1], 3.0f);
    EXPECT_EQ(cudaStreamQuery(queue), cudaErrorNotReady);
    let_go = true;
    waiter.join();
    EXPECT_CUDA(cudaStreamQuery(queue));
  }
}

}  // namespace
}  // namespace fake
