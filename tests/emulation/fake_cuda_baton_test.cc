#include <array>
#include <atomic>
#include <map>
#include <set>
#include <thread>
#include <vector>

#include "base/mutex.h"
#include "tests/emulation/fake_cuda_fixture.h"

namespace fake {
namespace {

constexpr int kCount = 3000;
// A busy machine must not turn into a lost baton.
constexpr auto kNever = std::chrono::minutes(4);

class FakeCudaBaton : public FakeCuda {};

// Which stream each call was for, streams numbered by first appearance.
std::vector<int> trace() {
  std::map<cudaStream_t, int> numbers;
  std::vector<int> trace;
  for (const Call& call : call_log()) {
    const auto number = static_cast<int>(numbers.size());
    trace.push_back(numbers.emplace(call.stream, number).first->second);
  }
  return trace;
}

// Three workers hand items to the caller through base's mutex and condition variable, each behind a
// copy of its own; the caller waits for all. Returns in which order everything happened.
std::vector<int> run(std::uint64_t seed) {
  reset({.policy = Policy::kRandom, .seed = seed, .baton = true, .baton_patience = kNever});
  constexpr int kWorkers = 3;
  constexpr int kItems = 4;
  sluice::Mutex mutex;
  sluice::CondVar changed;
  std::vector<int> items;  // who delivered, in order

  std::vector<std::thread> workers;
  for (int w = 0; w < kWorkers; ++w) {
    expect_threads(1);
    workers.emplace_back([&, w] {
      cudaStream_t queue = nullptr;
      void* host = nullptr;
      void* memory = nullptr;
      EXPECT_CUDA(cudaStreamCreateWithFlags(&queue, cudaStreamNonBlocking));
      EXPECT_CUDA(cudaHostAlloc(&host, kCount, 0));
      EXPECT_CUDA(cudaMalloc(&memory, kCount));
      for (int item = 0; item < kItems; ++item) {
        EXPECT_CUDA(cudaMemcpyAsync(memory, host, kCount, cudaMemcpyDefault, queue));
        EXPECT_CUDA(cudaStreamSynchronize(queue));
        {
          const sluice::MutexLock lock(mutex);
          items.push_back(w);
        }
        changed.notify_one();
      }
    });
    int device = 0;
    EXPECT_CUDA(cudaGetDevice(&device));  // where the newcomer is awaited
  }
  {
    const sluice::MutexLock lock(mutex);
    while (items.size() < kWorkers * kItems) changed.wait(mutex);
  }
  {
    const Outside outside;
    for (std::thread& worker : workers) worker.join();
  }
  EXPECT_EQ(batons_lost(), 0);
  std::vector<int> all = trace();
  all.insert(all.end(), items.begin(), items.end());
  return all;
}

TEST_F(FakeCudaBaton, TheSameSeedIsTheSameInterleavingOfSeveralThreads) {
  std::set<std::vector<int>> seen;
  for (std::uint64_t seed = 1; seed <= 5; ++seed) {
    const std::vector<int> first = run(seed);
    for (int again = 0; again < 4; ++again) EXPECT_EQ(run(seed), first) << "seed " << seed;
    seen.insert(first);
  }
  EXPECT_GE(seen.size(), 4u) << "seeds make a difference";
}

TEST_F(FakeCudaBaton, AThreadThatIsKeptFromAMutexDoesNotKeepTheBaton) {
  start({.baton = true, .baton_patience = kNever});
  sluice::Mutex mutex;
  int device = 0;
  std::atomic<bool> done = false;
  expect_threads(1);
  mutex.lock();
  std::thread other([&] {
    (void)cudaGetDevice(&device);
    const sluice::MutexLock lock(mutex);
    done = true;
  });
  for (int i = 0; i < 100; ++i) EXPECT_CUDA(cudaSetDevice(0));
  EXPECT_FALSE(done);
  mutex.unlock();
  {
    const Outside outside;
    other.join();
  }
  EXPECT_TRUE(done);
  EXPECT_EQ(batons_lost(), 0);
}

TEST_F(FakeCudaBaton, ATimedWaitEndsWhenNobodyElseCanRun) {
  start({.baton = true, .baton_patience = kNever});
  sluice::Mutex mutex;
  sluice::CondVar never;
  const sluice::MutexLock lock(mutex);
  never.wait_for(mutex, std::chrono::hours(100));
  EXPECT_EQ(batons_lost(), 0);
}

TEST_F(FakeCudaBaton, AHolderThatWaitsByOtherMeansLosesItAndIsCounted) {
  start({.baton = true, .baton_patience = std::chrono::milliseconds(20)});
  expect_threads(1);
  int device = 0;
  std::atomic<int> num_calls_made = 0;
  std::thread other([&] {
    for (int i = 0; i < 10; ++i) {
      EXPECT_CUDA(cudaSetDevice(0));
      ++num_calls_made;
    }
  });
  EXPECT_CUDA(cudaGetDevice(&device));
  while (num_calls_made < 10) std::this_thread::yield();  // what the baton cannot see
  EXPECT_GE(batons_lost(), 1);
  EXPECT_CUDA(cudaGetDevice(&device));
  other.join();
}

TEST_F(FakeCudaBaton, WithoutItNothingIsHooked) {
  EXPECT_EQ(sluice::wait_hooks.load(), nullptr);
  start({.baton = true, .baton_patience = kNever});
  EXPECT_NE(sluice::wait_hooks.load(), nullptr);
  start({});
  EXPECT_EQ(sluice::wait_hooks.load(), nullptr);
}

}  // namespace
}  // namespace fake
