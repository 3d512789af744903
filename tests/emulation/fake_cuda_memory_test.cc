#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <set>

#include "tests/emulation/fake_cuda_fixture.h"
#include "tests/emulation/registry.h"

namespace fake {
namespace {

class FakeCudaMemory : public FakeCuda {};
using FakeCudaMemoryDeathTest = FakeCudaMemory;

std::size_t free_bytes() {
  std::size_t free_now = 0;
  std::size_t total = 0;
  EXPECT_CUDA(cudaMemGetInfo(&free_now, &total));
  return free_now;
}

TEST_F(FakeCudaMemory, AnAllocationCostsItsBytesUntilItIsFreed) {
  start({.device_bytes = 10'000});
  EXPECT_EQ(free_bytes(), 10'000u);
  float* const first = device(1000);
  EXPECT_EQ(free_bytes(), 6'000u);
  EXPECT_EQ(stats().device_bytes, 4'000u);
  void* second = nullptr;
  EXPECT_REFUSED(
      cudaMalloc(&second, 6'001), cudaErrorMemoryAllocation,
      "cudaMalloc: got 6001 bytes, expected at most 6000: 4000 of 10000 bytes are taken");
  EXPECT_CUDA(cudaMalloc(&second, 6'000));
  EXPECT_CUDA(cudaFree(first));
  EXPECT_CUDA(cudaFree(second));
  EXPECT_EQ(free_bytes(), 10'000u);
  EXPECT_EQ(stats().peak_device_bytes, 10'000u);
}

TEST_F(FakeCudaMemory, NothingAskedIsANullPointer) {
  void* memory = &memory;
  EXPECT_CUDA(cudaMalloc(&memory, 0));
  EXPECT_EQ(memory, nullptr);
  EXPECT_CUDA(cudaFree(nullptr));
  EXPECT_CUDA(cudaFreeHost(nullptr));
}

TEST_F(FakeCudaMemory, NewMemoryIsPoison) {
  float* const memory = device(100);
  const Peek peek;
  for (int i = 0; i < 100; ++i) EXPECT_TRUE(std::isnan(memory[i]));
}

TEST_F(FakeCudaMemory, AllocationsEndAtTheirGuardOrLieAsCudaPlacesThem) {
  std::set<std::uintptr_t> remainders;
  for (std::uint64_t seed = 1; seed <= 20; ++seed) {
    start({.seed = seed});
    const auto address = reinterpret_cast<std::uintptr_t>(device(5));  // 20 bytes
    EXPECT_EQ(address % 16, 0u);
    remainders.insert(address % 4096);
  }
  EXPECT_EQ(remainders, (std::set<std::uintptr_t>{4096 - 32, 4096 - 256}));
}

TEST_F(FakeCudaMemoryDeathTest, TheHostIsStoppedAtDeviceMemory) {
  float* const memory = device(10);
  EXPECT_EXIT(memory[3] = 1.0f, testing::ExitedWithCode(87),
              "HOST CODE touches device memory: .*cuda:0 allocation 1\\+12 of 40");
  {
    const Peek peek;
    memory[3] = 1.0f;
  }
  EXPECT_EXIT(memory[3] = 1.0f, testing::ExitedWithCode(87), "HOST CODE touches device memory");
}

TEST_F(FakeCudaMemoryDeathTest, TheHostIsStoppedAgainAfterDeviceWork) {
  float* const memory = device(10);
  copy(memory, pinned(10, 1.0f), 10, nullptr);
  EXPECT_CUDA(cudaDeviceSynchronize());
  EXPECT_EXIT(memory[3] = 1.0f, testing::ExitedWithCode(87), "HOST CODE touches device memory");
}

TEST_F(FakeCudaMemoryDeathTest, FreedMemoryStaysUnmappedAndKeepsItsName) {
  float* const memory = device(10);
  float* const host = pinned(10, 1.0f);
  EXPECT_CUDA(cudaFree(memory));
  EXPECT_CUDA(cudaFreeHost(host));
  const Peek peek;
  EXPECT_EXIT(memory[3] = 1.0f, testing::ExitedWithCode(87), "cuda:0 allocation 1.*freed");
  EXPECT_EXIT(host[3] = 1.0f, testing::ExitedWithCode(87), "pinned allocation 1.*freed");
  for (int i = 0; i < 50; ++i) EXPECT_NE(device(10), memory) << "an address given twice";
}

TEST_F(FakeCudaMemoryDeathTest, ABytePastTheEndLiesInAGuardOfMegabytes) {
  start({.seed = 2});
  float* const memory = device(1024);  // a multiple of 256 bytes: aligned, and at the guard
  const Peek peek;
  EXPECT_EXIT(memory[1024] = 1.0f, testing::ExitedWithCode(87), "past the end");
  EXPECT_EXIT(memory[1024 + (3 << 20)] = 1.0f, testing::ExitedWithCode(87), "cuda:0 allocation 1");
}

TEST_F(FakeCudaMemory, WithoutProtectionTheHostMayLook) {
  start({.protect = false});
  EXPECT_TRUE(std::isnan(device(10)[9]));
}

TEST_F(FakeCudaMemory, UnknownPointersAreRefusedByName) {
  float heap = 0.0f;
  float* const memory = device(10);
  EXPECT_REFUSED(cudaFree(&heap), cudaErrorInvalidValue, "start of a live allocation");
  EXPECT_REFUSED(cudaFree(memory + 1), cudaErrorInvalidValue, "cuda:0 allocation 1+4");
  EXPECT_REFUSED(cudaFreeHost(memory), cudaErrorInvalidValue, "cuda:0 allocation 1");
  EXPECT_CUDA(cudaFree(memory));
  EXPECT_REFUSED(cudaFree(memory), cudaErrorInvalidValue, "freed");
}

TEST_F(FakeCudaMemory, FreeingWaitsForTheDevice) {
  for (const Policy policy : {Policy::kLazy, Policy::kAhead, Policy::kRandom}) {
    start({.policy = policy});
    float* const memory = device(5000);
    float* const other = device(1);
    float* const result = pinned(5000, 0.0f);
    copy(memory, pinned(5000, 2.0f), 5000, stream());
    copy(result, memory, 5000, stream());  // another stream: in no order with the one above
    EXPECT_CUDA(cudaFree(other));
    EXPECT_EQ(stats().queued, 0) << to_string(policy);
  }
}

TEST_F(FakeCudaMemory, PinnedMemoryFreedUnderACopyIsReportedAndTheCopyFaults) {
  start({.policy = Policy::kLazy});
  float* const source = pinned(100, 1.0f);
  copy(device(100), source, 100, stream());
  EXPECT_CUDA(cudaFreeHost(source));
  EXPECT_EQ(
      take_finding(),
      "cudaFreeHost: got pinned allocation 1 while a copy of 400 bytes to cuda:0 allocation 1 "
      "is queued on stream 1 of cuda:0, expected memory that no queued work uses; wait first");
  EXPECT_REFUSED(cudaDeviceSynchronize(), cudaErrorIllegalAddress, "reads pinned");
  EXPECT_NE(last_failure().find("freed"), std::string::npos) << last_failure();
}

TEST_F(FakeCudaMemory, RegisteredPagesAreReadLateAndOthersAtTheCall) {
  for (const bool is_registered : {false, true}) {
    start({.policy = Policy::kLazy});
    std::vector<float> source(100, 1.0f);
    if (is_registered) {
      EXPECT_CUDA(cudaHostRegister(source.data(), 400, cudaHostRegisterPortable));
    }
    float* const result = pinned(100, 0.0f);
    float* const memory = device(100);
    const cudaStream_t queue = stream();
    copy(memory, source.data(), 100, queue);
    source.assign(100, 7.0f);
    copy(result, memory, 100, queue);
    EXPECT_CUDA(cudaStreamSynchronize(queue));
    EXPECT_EQ(result[99], is_registered ? 7.0f : 1.0f);
    EXPECT_EQ(stats().pageable_copies, is_registered ? 0u : 1u);
    EXPECT_EQ(stats().registered_bytes, is_registered ? 400u : 0u);
    if (is_registered) {
      EXPECT_CUDA(cudaHostUnregister(source.data()));
      // They are the host's own again, as pages that were mapped anew would be.
      copy(memory, source.data(), 100, queue);
      EXPECT_CUDA(cudaStreamSynchronize(queue));
      EXPECT_EQ(stats().pageable_copies, 1u);
    }
    EXPECT_EQ(stats().registered_ranges, 0);
  }
}

TEST_F(FakeCudaMemory, RegisteringChecksItsRange) {
  start({.pinned_bytes = 1000});
  std::vector<char> pages(3000);
  EXPECT_REFUSED(cudaHostRegister(pages.data(), 1001, 0), cudaErrorMemoryAllocation,
                 "expected no more than 1000");
  EXPECT_CUDA(cudaHostRegister(pages.data() + 100, 500, 0));
  EXPECT_REFUSED(cudaHostRegister(pages.data(), 101, 0), cudaErrorHostMemoryAlreadyRegistered,
                 "overlaps registered range 1");
  EXPECT_REFUSED(cudaHostRegister(pages.data() + 599, 2, 0), cudaErrorHostMemoryAlreadyRegistered,
                 "overlaps registered range 1");
  EXPECT_CUDA(cudaHostRegister(pages.data(), 100, 0));
  EXPECT_REFUSED(cudaHostUnregister(pages.data() + 50), cudaErrorHostMemoryNotRegistered,
                 "expected the start of a live registered range");
  EXPECT_REFUSED(cudaHostRegister(pages.data() + 700, 10, cudaHostRegisterReadOnly),
                 cudaErrorNotSupported, "flags 8");
  void* memory = nullptr;
  EXPECT_REFUSED(cudaHostAlloc(&memory, 401, 0), cudaErrorMemoryAllocation, "600 of 1000");
  EXPECT_CUDA(cudaHostUnregister(pages.data()));
  EXPECT_CUDA(cudaHostUnregister(pages.data() + 100));
}

TEST_F(FakeCudaMemory, ACopyStaysInsideBothOfItsEnds) {
  float* const memory = device(100);
  float* const host = pinned(100, 1.0f);
  const cudaStream_t queue = stream();
  EXPECT_REFUSED(cudaMemcpyAsync(memory + 1, host, 400, cudaMemcpyHostToDevice, queue),
                 cudaErrorInvalidValue, "cuda:0 allocation 1+4 of 400 bytes, expected at most 396");
  EXPECT_REFUSED(cudaMemcpyAsync(memory, host + 99, 8, cudaMemcpyHostToDevice, queue),
                 cudaErrorInvalidValue, "source of 8 bytes");
  EXPECT_REFUSED(cudaMemcpyAsync(memory, host, 400, cudaMemcpyDeviceToHost, queue),
                 cudaErrorInvalidValue, "got direction 2 from pinned to device memory");
  EXPECT_CUDA(cudaFree(memory));
  EXPECT_REFUSED(cudaMemcpyAsync(memory, host, 400, cudaMemcpyDefault, queue),
                 cudaErrorInvalidValue, "expected memory that is alive");
  EXPECT_EQ(stats().copies, 0u);
}

TEST_F(FakeCudaMemory, MemoryOfAnotherDeviceIsReported) {
  start({.num_devices = 2});
  float* const here = device(10);
  const cudaStream_t queue = stream();
  EXPECT_CUDA(cudaSetDevice(1));
  float* const there = device(10);
  EXPECT_REFUSED(cudaMemcpyAsync(there, here, 40, cudaMemcpyDeviceToDevice, queue),
                 cudaErrorInvalidValue, "cuda:1 allocation 1");
  EXPECT_NE(take_finding().find("expected memory of that device"), std::string::npos);
  EXPECT_CUDA(cudaFree(here)) << "from any device";
  EXPECT_EQ(stats().device_bytes, 40u);
}

TEST_F(FakeCudaMemory, PointersSayWhereTheyLie) {
  float heap = 0.0f;
  float* const memory = device(10);
  float* const host = pinned(10, 0.0f);
  cudaPointerAttributes attributes = {};
  EXPECT_CUDA(cudaPointerGetAttributes(&attributes, memory + 5));
  EXPECT_EQ(attributes.type, cudaMemoryTypeDevice);
  EXPECT_EQ(attributes.hostPointer, nullptr);
  EXPECT_CUDA(cudaPointerGetAttributes(&attributes, host + 9));
  EXPECT_EQ(attributes.type, cudaMemoryTypeHost);
  EXPECT_EQ(attributes.devicePointer, host + 9);
  EXPECT_CUDA(cudaPointerGetAttributes(&attributes, &heap));
  EXPECT_EQ(attributes.type, cudaMemoryTypeUnregistered);
}

// What a child returns, as the code it ends with.
int in_a_child(const std::function<bool()>& check) {
  const pid_t child = fork();
  if (child == 0) _exit(check() ? 0 : 1);
  int status = -1;
  EXPECT_EQ(waitpid(child, &status, 0), child);
  return status;
}

TEST_F(FakeCudaMemory, AForkedChildIsRefusedEveryCallAndTheParentGoesOn) {
  for (const bool lost : {true, false}) {
    start({.forks_lose_devices = lost});
    float* const memory = device(10);
    const cudaStream_t queue = stream();
    const cudaError_t expected = lost ? cudaErrorInitializationError : cudaSuccess;
    EXPECT_EQ(in_a_child([&] {
                int count = 0;
                return cudaGetDeviceCount(&count) == expected &&
                       (!lost || last_failure().find("forked") != std::string::npos);
              }),
              0);
    EXPECT_EQ(in_a_child([&] {
                return cudaFree(memory) == expected && cudaStreamDestroy(queue) == expected &&
                       stats().device_bytes == (lost ? 40u : 0u);
              }),
              0);
    EXPECT_EQ(stats().device_bytes, 40u);
    EXPECT_CUDA(cudaMemsetAsync(memory, 0, 40, queue));
    EXPECT_CUDA(cudaStreamSynchronize(queue));
    EXPECT_CUDA(cudaFree(memory));
  }
}

}  // namespace
}  // namespace fake
