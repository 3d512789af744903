// Planted bugs of streams: what the device tier must do, with one thing left out at a time. Each
// must die under the policies that can show it, with its own text, and the scenario without a bug
// must live under all of them. A bug that survives its row is a hole in the fake runtime.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "tests/emulation/fake_cuda.h"
#include "tests/emulation/planted/streams.h"
#include "tests/emulation/simt.h"

namespace planted {
namespace {

using fake::Policy;

enum class Bug {
  kNone,
  kReadyWaitMissing,       ///< I3: the kernel's stream does not wait for the slot's bytes
  kReadyWaitTooEarly,      ///< I3: it waits for the event before it was recorded
  kLastUseWaitMissing,     ///< I2: the copy does not wait for the slot's last reader
  kSourceOverwritten,      ///< the pinned source changes while its copy is queued
  kResultReadEarly,        ///< the host reads the result before it synchronises
  kSlabFreed,              ///< kernels are queued after their slab was freed
  kHostReadsDevice,        ///< the host follows a device pointer
  kDependencyWaitMissing,  ///< a dependent launch without griddepcontrol.wait
};

constexpr int kExperts = 4;
constexpr int kSlots = 2;
constexpr int kCount = 3000;  // three chunks of a copy, several batches of blocks
constexpr std::size_t kBytes = kCount * sizeof(float);

float weight(int expert, int i) {
  return static_cast<float>(expert + 1) + 0.001f * static_cast<float>(i % 100);
}
float input(int i) { return 0.5f + 0.01f * static_cast<float>(i % 17); }

// Everything that must be given back whatever happens, as the tier's classes do.
struct Resources {
  std::vector<void*> device;
  std::vector<void*> pinned;
  std::vector<cudaStream_t> streams;
  std::vector<cudaEvent_t> events;
  ~Resources() {
    for (cudaStream_t stream : streams) (void)cudaStreamDestroy(stream);
    for (cudaEvent_t event : events) (void)cudaEventDestroy(event);
    for (void* memory : device) (void)cudaFree(memory);
    for (void* memory : pinned) (void)cudaFreeHost(memory);
  }
};

// "cudaErrorMemoryAllocation in slab", or empty.
#define TRY(what, call)                                                              \
  if (const cudaError_t error_ = (call); error_ != cudaSuccess) {                    \
    return std::string(cudaGetErrorName(error_)) + " in " what + std::string(": ") + \
           fake::last_failure();                                                     \
  }

// Experts stream through two slots, in two waves; each scales the input into its own rows, one more
// kernel adds one, and the rows come back. Returns what is wrong: an error, or the first bad value.
std::string run(Bug bug, bool user_stream) {
  Resources own;
  const auto device = [&](std::size_t bytes, float** result) {
    void* memory = nullptr;
    const cudaError_t error = cudaMalloc(&memory, bytes);
    if (error == cudaSuccess) own.device.push_back(memory);
    *result = static_cast<float*>(memory);
    return error;
  };
  const auto pinned = [&](std::size_t bytes, float** result) {
    void* memory = nullptr;
    const cudaError_t error = cudaHostAlloc(&memory, bytes, cudaHostAllocDefault);
    if (error == cudaSuccess) own.pinned.push_back(memory);
    *result = static_cast<float*>(memory);
    return error;
  };
  const auto stream = [&](cudaStream_t* result) {
    const cudaError_t error = cudaStreamCreateWithFlags(result, cudaStreamNonBlocking);
    if (error == cudaSuccess) own.streams.push_back(*result);
    return error;
  };
  const auto event = [&](cudaEvent_t* result) {
    const cudaError_t error = cudaEventCreateWithFlags(result, cudaEventDisableTiming);
    if (error == cudaSuccess) own.events.push_back(*result);
    return error;
  };

  float *experts, *host_in, *host_out, *slab, *in, *scaled, *out;
  TRY("host experts", pinned(kExperts * kBytes, &experts));
  TRY("host input", pinned(kBytes, &host_in));
  TRY("host output", pinned(kExperts * kBytes, &host_out));
  TRY("slab", device(kSlots * kBytes, &slab));
  TRY("input", device(kBytes, &in));
  TRY("scaled", device(kExperts * kBytes, &scaled));
  TRY("output", device(kExperts * kBytes, &out));
  for (int i = 0; i < kCount; ++i) host_in[i] = input(i);
  for (int e = 0; e < kExperts; ++e) {
    for (int i = 0; i < kCount; ++i) experts[e * kCount + i] = weight(e, i);
  }
  cudaStream_t copies = nullptr;
  cudaStream_t compute = nullptr;  // torch's current stream
  TRY("copy stream", stream(&copies));
  if (user_stream) TRY("compute stream", stream(&compute));
  std::array<cudaEvent_t, kSlots> ready = {};
  std::array<cudaEvent_t, kSlots> last_use = {};
  for (int slot = 0; slot < kSlots; ++slot) {
    TRY("event", event(&ready[slot]));
    TRY("event", event(&last_use[slot]));
  }

  TRY("copy", cudaMemcpyAsync(in, host_in, kBytes, cudaMemcpyHostToDevice, compute));
  for (int expert = 0; expert < kExperts; ++expert) {
    const int slot = expert % kSlots;
    float* const weights = slab + static_cast<std::ptrdiff_t>(slot) * kCount;
    float* const source = experts + static_cast<std::ptrdiff_t>(expert) * kCount;
    const std::ptrdiff_t row = static_cast<std::ptrdiff_t>(expert) * kCount;
    if (bug != Bug::kLastUseWaitMissing) {
      TRY("wait", cudaStreamWaitEvent(copies, last_use[slot], 0));
    }
    if (bug == Bug::kReadyWaitTooEarly) TRY("wait", cudaStreamWaitEvent(compute, ready[slot], 0));
    TRY("copy", cudaMemcpyAsync(weights, source, kBytes, cudaMemcpyHostToDevice, copies));
    TRY("record", cudaEventRecord(ready[slot], copies));
    if (bug != Bug::kReadyWaitMissing && bug != Bug::kReadyWaitTooEarly) {
      TRY("wait", cudaStreamWaitEvent(compute, ready[slot], 0));
    }
    if (bug == Bug::kSlabFreed && expert == kExperts - 1) {
      TRY("free", cudaFree(slab));
      own.device.erase(own.device.begin());
    }
    TRY("scale", launch_scale({weights, in, scaled + row, kCount}, compute));
    TRY("add_one", launch_add_one({scaled + row, out + row, kCount},
                                  bug != Bug::kDependencyWaitMissing, compute));
    TRY("record", cudaEventRecord(last_use[slot], compute));
  }
  if (bug == Bug::kSourceOverwritten) std::memset(experts, 0, kExperts * kBytes);
  if (bug == Bug::kHostReadsDevice) host_out[0] = slab[5];
  TRY("copy", cudaMemcpyAsync(host_out, out, kExperts * kBytes, cudaMemcpyDeviceToHost, compute));
  if (bug != Bug::kResultReadEarly) TRY("synchronize", cudaStreamSynchronize(compute));
  std::string wrong;
  for (int e = 0; e < kExperts && wrong.empty(); ++e) {
    for (int i = 0; i < kCount && wrong.empty(); ++i) {
      const float got = host_out[e * kCount + i];
      const float expected = weight(e, i) * input(i) + 1.0f;
      if (!(std::abs(got - expected) < 1e-4f)) {
        wrong = "wrong value " + std::to_string(got) + " for " + std::to_string(expected);
      }
    }
  }
  if (bug == Bug::kResultReadEarly) TRY("synchronize", cudaStreamSynchronize(compute));
  return wrong;
}
#undef TRY

struct Cell {
  Policy policy;
  std::uint64_t seed;
  bool user_stream;
};

std::string to_string(const Cell& cell) {
  static constexpr const char* kNames[] = {"eager", "lazy", "ahead", "random"};
  return std::string(kNames[static_cast<int>(cell.policy)]) + ", seed " +
         std::to_string(cell.seed) + (cell.user_stream ? ", a user's stream" : ", stream 0");
}

constexpr int kSeeds = 12;

std::string run_cell(Bug bug, const Cell& cell) {
  fake::reset({.policy = cell.policy, .seed = cell.seed});
  simt::options() = {.order = static_cast<simt::Order>(cell.seed % 4), .seed = cell.seed};
  return run(bug, cell.user_stream);
}

std::vector<Cell> cells(Policy policy) {
  std::vector<Cell> cells;
  // The others use the seed for the order of chunks and threads alone.
  const std::uint64_t seeds = policy == Policy::kRandom ? kSeeds : 2;
  for (std::uint64_t seed = 1; seed <= seeds; ++seed) {
    cells.push_back({policy, seed, false});
    cells.push_back({policy, seed, true});
  }
  return cells;
}

constexpr std::array kPolicies = {Policy::kEager, Policy::kLazy, Policy::kAhead, Policy::kRandom};

// Where a bug shows as bytes, an access that is looked at may name it first.
bool is_wrong_bytes(const std::string& what) {
  return what.starts_with("wrong value") || what.find("uninitialised") != std::string::npos;
}

// `finds`: policies under which the bug shows: at every seed, by chance under kRandom. The others
// must let it live, or the row says less than the runtime does.
void expect_row(Bug bug, std::initializer_list<Policy> finds) {
  for (const Policy policy : kPolicies) {
    const bool expected = std::find(finds.begin(), finds.end(), policy) != finds.end();
    std::size_t num_found = 0;
    for (const Cell& cell : cells(policy)) {
      const std::string what = run_cell(bug, cell);
      num_found += is_wrong_bytes(what) ? 1 : 0;
      if (expected && policy != Policy::kRandom) {
        EXPECT_TRUE(is_wrong_bytes(what)) << to_string(cell) << ": got \"" << what << "\"";
      } else if (!is_wrong_bytes(what) || !expected) {
        EXPECT_EQ(what, "") << to_string(cell);
      }
    }
    if (expected) {
      EXPECT_GE(3 * num_found, cells(policy).size()) << to_string(cells(policy)[0]);
    }
  }
}

TEST(PlantedStreams, TheScenarioWithoutABugLivesUnderEveryPolicy) {
  for (const Policy policy : kPolicies) {
    for (const Cell& cell : cells(policy)) {
      EXPECT_EQ(run_cell(Bug::kNone, cell), "") << to_string(cell);
      EXPECT_TRUE(fake::findings().empty()) << fake::findings().front();
      const fake::Stats stats = fake::stats();
      EXPECT_EQ(stats.device_allocations + stats.pinned_allocations, 0) << to_string(cell);
      EXPECT_EQ(stats.streams + stats.events + stats.queued, 0) << to_string(cell);
      EXPECT_EQ(stats.pageable_copies, 0u);
      EXPECT_EQ(stats.copies, 1u + kExperts + 1u);
    }
  }
}

TEST(PlantedStreams, AMissingReadyWaitShowsWhenOnlyAwaitedWorkRuns) {
  expect_row(Bug::kReadyWaitMissing, {Policy::kLazy, Policy::kRandom});
}

TEST(PlantedStreams, AWaitForAnEventThatIsRecordedLaterIsNone) {
  expect_row(Bug::kReadyWaitTooEarly, {Policy::kLazy, Policy::kRandom});
}

TEST(PlantedStreams, AMissingLastUseWaitShowsWhenOtherStreamsRunAhead) {
  expect_row(Bug::kLastUseWaitMissing, {Policy::kAhead, Policy::kRandom});
}

TEST(PlantedStreams, APinnedSourceIsReadLate) {
  expect_row(Bug::kSourceOverwritten, {Policy::kLazy, Policy::kAhead, Policy::kRandom});
}

TEST(PlantedStreams, AResultIsThereOnceTheHostHasWaited) {
  expect_row(Bug::kResultReadEarly, {Policy::kLazy, Policy::kAhead, Policy::kRandom});
}

TEST(PlantedStreams, AMissingDependencyWaitShowsWherePrologsRunFirst) {
  expect_row(Bug::kDependencyWaitMissing, {Policy::kLazy, Policy::kAhead, Policy::kRandom});
}

TEST(PlantedStreams, AFreedSlabFaultsByNameUnderEveryPolicy) {
  for (const Policy policy : kPolicies) {
    for (const Cell& cell : cells(policy)) {
      const std::string what = run_cell(Bug::kSlabFreed, cell);
      EXPECT_NE(what.find("scale block"), std::string::npos) << to_string(cell) << ": " << what;
      EXPECT_NE(what.find("cuda:0 allocation 1"), std::string::npos) << what;
      EXPECT_NE(what.find("(freed)"), std::string::npos) << to_string(cell) << ": " << what;
    }
  }
}

TEST(PlantedStreamsDeathTest, HostCodeThatFollowsADevicePointerEndsTheProcess) {
  for (const Policy policy : kPolicies) {
    EXPECT_EXIT((void)run_cell(Bug::kHostReadsDevice, {policy, 1, true}),
                testing::ExitedWithCode(87),
                "HOST CODE touches device memory: .*cuda:0 allocation 1");
  }
}

TEST(PlantedStreams, ARefusedAllocationIsNamedAndLeavesNothing) {
  for (const Policy policy : kPolicies) {
    fake::reset({.policy = policy});
    fake::fail_after(fake::Api::kMalloc, 2, cudaErrorMemoryAllocation);
    const std::string what = run(Bug::kNone, true);
    EXPECT_NE(what.find("cudaErrorMemoryAllocation in scaled"), std::string::npos) << what;
    EXPECT_EQ(fake::stats().device_allocations, 0);
    EXPECT_EQ(run(Bug::kNone, true), "") << "a refusal is no fault";
  }
}

TEST(PlantedStreams, ALostDeviceIsToldByEveryLaterCall) {
  for (const Policy policy : kPolicies) {
    fake::reset({.policy = policy});
    fake::fail_after(fake::Api::kLaunchKernel, 3, cudaErrorLaunchFailure, true);
    std::string what = run(Bug::kNone, true);
    EXPECT_NE(what.find("cudaErrorLaunchFailure in add_one"), std::string::npos) << what;
    what = run(Bug::kNone, true);
    EXPECT_NE(what.find("cudaErrorLaunchFailure in host experts"), std::string::npos) << what;
    EXPECT_EQ(fake::stats().device_allocations + fake::stats().pinned_allocations, 0);
  }
}

// Every error path of the scenario runs once: nothing may leak, and the error must come out.
TEST(PlantedStreams, EveryCallMayFailAndNothingLeaks) {
  for (const auto api :
       {fake::Api::kMalloc, fake::Api::kHostAlloc, fake::Api::kStreamCreate,
        fake::Api::kEventCreate, fake::Api::kMemcpyAsync, fake::Api::kEventRecord,
        fake::Api::kStreamWaitEvent, fake::Api::kLaunchKernel, fake::Api::kStreamSynchronize}) {
    for (const bool sticky : {false, true}) {
      int calls = 0;
      for (;; ++calls) {
        fake::reset({.seed = static_cast<std::uint64_t>(calls + 1)});
        fake::fail_after(api, calls, cudaErrorUnknown, sticky);
        const std::string what = run(Bug::kNone, true);
        EXPECT_EQ(fake::stats().device_allocations + fake::stats().pinned_allocations, 0);
        EXPECT_EQ(fake::stats().streams + fake::stats().events, 0);
        if (fake::injected() == 0) {
          EXPECT_EQ(what, "");
          break;
        }
        EXPECT_NE(what.find("injected cudaErrorUnknown"), std::string::npos)
            << fake::name(api) << " " << calls << ": " << what;
      }
      EXPECT_GT(calls, 0) << fake::name(api) << " is never called";
    }
  }
}

}  // namespace
}  // namespace planted
