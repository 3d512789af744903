// Each call of the tier fails once, at each place where it is made: the error reaches whoever
// waits, nothing leaks, and the next session works.
#include <gtest/gtest.h>

#include <cerrno>
#include <filesystem>

#include "base/error.h"
#include "store/file_calls.h"
#include "tests/emulation/tier/cuda_rig.h"

namespace sluice::testing {
namespace {

struct Scenario {
  const Model& model;
  std::vector<Call> calls;
  std::vector<std::vector<std::byte>> expected;
};

/// A session's whole life. Which of its calls failed, with what; "" where all was right.
std::string live(const Scenario& scenario, bool user_stream) {
  try {
    CudaRig rig(scenario.model,
                {.device_memory = scenario.model.slots(3),
                 .host_memory = scenario.model.slots(5),
                 .prefill = "cache"},  // nothing is guessed: a guess may fail in silence
                user_stream);
    std::string failure;
    for (std::size_t i = 0; i < scenario.calls.size(); ++i) {
      try {
        const std::vector<std::byte> out = rig.forward(scenario.calls[i]);
        EXPECT_EQ(out, scenario.expected[i]) << "call " << i << " gave other bits and no error";
      } catch (const std::exception& error) {
        if (failure.empty()) failure = error.what();
      }
    }
    const auto residency = rig.engine().residency();
    for (const auto& pool : residency) {
      for (const SlotCache::SlotView& view : pool) EXPECT_EQ(view.leases, 0);
    }
    const EngineStats stats = rig.engine().stats();
    EXPECT_LE(stats.resident_bytes, stats.budget_bytes);
    EXPECT_NO_THROW(rig.engine().close());  // whatever has failed before, or fails in it
    const fake::Stats left = fake::stats();
    EXPECT_EQ(left.device_bytes, 0u);
    EXPECT_EQ(left.pinned_bytes + left.registered_bytes, 0u);
    EXPECT_EQ(left.streams, user_stream ? 1 : 0);
    EXPECT_EQ(left.events, 0);
    return failure;
  } catch (const std::exception& error) {
    return error.what();
  }
}

Scenario make_scenario(const Model& model) {
  std::mt19937_64 rng(5);
  Scenario scenario{.model = model, .calls = {}, .expected = {}};
  for (int i = 0; i < 6; ++i) {
    scenario.calls.push_back(
        make_call(model.shape(), i % 2,
                  {.num_tokens = i == 2 ? 40 : 2, .activations = model.shape().dtype}, rng));
  }
  begin({.policy = fake::Policy::kEager});
  CudaRig rig(model, {.device_memory = model.slots(16), .host_memory = model.slots(16)}, false);
  for (const Call& call : scenario.calls) scenario.expected.push_back(rig.forward(call));
  return scenario;
}

class CudaFaults : public ::testing::TestWithParam<fake::Api> {};

TEST_P(CudaFaults, ReachTheCallerAndLeaveNothing) {
  const Model model({.dtype = DType::kBF16}, 3);
  const Scenario scenario = make_scenario(model);
  expect_nothing_left();
  for (const bool sticky : {false, true}) {
    int struck = 0;
    for (int after = 0;; after += 1 + after / (kSanitized ? 4 : 8)) {
      SCOPED_TRACE("after " + std::to_string(after) + (sticky ? " calls, for good" : " calls"));
      const Schedule schedule{
          .order = simt::Order::kForward,
          .policy = after % 2 == 0 ? fake::Policy::kLazy : fake::Policy::kRandom,
          .seed = static_cast<std::uint64_t>(after + 1),
          .user_stream = after % 3 == 1};
      begin(schedule);
      // A refusal where the call may be refused, else a broken device.
      const bool may_refuse =
          GetParam() == fake::Api::kMalloc || GetParam() == fake::Api::kHostRegister;
      fake::fail_after(GetParam(), after,
                       sticky       ? cudaErrorIllegalAddress
                       : may_refuse ? cudaErrorMemoryAllocation
                                    : cudaErrorUnknown,
                       sticky);
      const std::string failure = live(scenario, schedule.user_stream);
      const bool injected = fake::injected() > 0;
      struck += injected ? 1 : 0;
      if (!injected) {
        EXPECT_EQ(failure, "");
        break;
      }
      const bool is_silent = failure.empty();
      // Silent is what gives back, and a pin that is refused: a degradation.
      const bool may_be_silent =
          GetParam() == fake::Api::kHostRegister || GetParam() == fake::Api::kHostUnregister ||
          GetParam() == fake::Api::kFree || GetParam() == fake::Api::kStreamDestroy ||
          GetParam() == fake::Api::kEventDestroy || GetParam() == fake::Api::kGetDevice ||
          GetParam() == fake::Api::kEventQuery || GetParam() == fake::Api::kEventSynchronize ||
          GetParam() == fake::Api::kMemGetInfo ||
          GetParam() == fake::Api::kThreadExchangeStreamCaptureMode;
      EXPECT_TRUE(!is_silent || may_be_silent);
      expect_nothing_left();
      ASSERT_FALSE(HasFailure());
    }
    EXPECT_GT(struck, 0) << fake::name(GetParam()) << " is never called";
  }
  // The machine works on.
  begin({});
  EXPECT_EQ(live(scenario, false), "");
  expect_nothing_left();
}

INSTANTIATE_TEST_SUITE_P(Calls, CudaFaults,
                         ::testing::Values(fake::Api::kMalloc, fake::Api::kFree,
                                           fake::Api::kHostRegister, fake::Api::kHostUnregister,
                                           fake::Api::kMemcpyAsync, fake::Api::kStreamCreate,
                                           fake::Api::kStreamDestroy, fake::Api::kStreamWaitEvent,
                                           fake::Api::kStreamIsCapturing, fake::Api::kEventCreate,
                                           fake::Api::kEventDestroy, fake::Api::kEventRecord,
                                           fake::Api::kEventQuery, fake::Api::kEventSynchronize,
                                           fake::Api::kLaunchKernel, fake::Api::kFuncGetAttributes,
                                           fake::Api::kThreadExchangeStreamCaptureMode),
                         [](const auto& each) { return std::string(fake::name(each.param)); });

// What is refused leaves the device as it was, and so the session.
TEST(CudaFaultsRefused, EndTheirForwardAndNoMore) {
  const Model model({.dtype = DType::kBF16}, 3);
  const Scenario scenario = make_scenario(model);
  int refused = 0;
  for (const fake::Api api : {fake::Api::kMemcpyAsync, fake::Api::kStreamWaitEvent}) {
    for (int after = 0;; after += 1 + after / 4) {
      SCOPED_TRACE(fake::name(api) + (" after " + std::to_string(after)) + " calls");
      begin({.policy = fake::Policy::kLazy, .seed = static_cast<std::uint64_t>(after + 1)});
      CudaRig rig(
          model,
          {.device_memory = model.slots(3), .host_memory = model.slots(5), .prefill = "cache"},
          after % 2 == 1);
      fake::fail_after(api, after, cudaErrorInvalidValue);
      for (std::size_t i = 0; i < scenario.calls.size(); ++i) {
        try {
          const CallOnDevice call(scenario.calls[i], rig.stream());
          rig.engine().forward(call.args());
          EXPECT_EQ(call.out(), scenario.expected[i]);
        } catch (const DeviceError& error) {
          EXPECT_FALSE(error.is_for_good());
          EXPECT_NE(std::string(error.what()).find("expected success; the device works on"),
                    std::string::npos)
              << error.what();
          ++refused;
        } catch (const std::runtime_error&) {  // it was a call of the test's own
        }
      }
      if (fake::injected() == 0) break;
      for (std::size_t i = 0; i < scenario.calls.size(); ++i) {
        EXPECT_EQ(rig.forward(scenario.calls[i]), scenario.expected[i]) << "after the refusal";
      }
      ASSERT_FALSE(HasFailure());
    }
  }
  EXPECT_GT(refused, 20);
  expect_nothing_left();
}

TEST(CudaFaultsRefused, OfSlotsCostsNoMemoryOfTheHost) {
  const Model model({.dtype = DType::kBF16}, 3);
  begin({});
  fake::fail_after(fake::Api::kMalloc, 0, cudaErrorMemoryAllocation);
  try {
    // Without a tier the host's slots are pinned at once.
    const CudaRig rig(model, {.device_memory = model.slots(3), .host_tier = "none"}, false);
    FAIL() << "expected a CapacityError";
  } catch (const CapacityError& error) {
    EXPECT_NE(std::string(error.what()).find("lower device_memory"), std::string::npos)
        << error.what();
  }
  EXPECT_EQ(fake::stats().peak_pinned_bytes, 0u);
  expect_nothing_left();
}

TEST(CudaFaultsLater, AnAsynchronousOneIsKept) {
  const Model model({.dtype = DType::kBF16}, 3);
  const Scenario scenario = make_scenario(model);
  for (int steps = 0; steps < 200; steps += 7) {
    SCOPED_TRACE("after " + std::to_string(steps) + " steps");
    begin({.seed = static_cast<std::uint64_t>(steps + 1)});
    fake::fault_after_steps(steps, cudaErrorIllegalAddress);
    const std::string failure = live(scenario, false);
    if (fake::injected() > 0) {
      EXPECT_NE(failure, "");
    }
    expect_nothing_left();
  }
}

/// Reads fail from the `n`-th on, for a while.
struct FailingReads {
  static inline std::atomic<int> left{-1};
  static ssize_t pread(int fd, void* target, std::size_t bytes, off_t offset) {
    if (left.load() >= 0 && left.fetch_sub(1) <= 0) {
      errno = EIO;
      return -1;
    }
    return ::pread(fd, target, bytes, offset);
  }
};

TEST(CudaFaultsDisk, AReadThatFailsEndsItsForwardAndTheSessionWorksOn) {
  const auto folder = std::filesystem::temp_directory_path();
  const std::string path = folder / ("sluice-cuda-faults-" + std::to_string(getpid()));
  const Model model({.dtype = DType::kBF16, .file = path}, 3);
  const Scenario scenario = make_scenario(model);
  FileCalls calls = file_calls();
  calls.pread = &FailingReads::pread;
  std::swap(file_calls(), calls);
  int failed = 0;
  for (int after = 0; after < 24; ++after) {
    SCOPED_TRACE("after " + std::to_string(after) + " reads");
    begin({.seed = static_cast<std::uint64_t>(after + 1)});
    CudaRig rig(model,
                {.device_memory = model.slots(3),
                 .host_memory = model.slots(5),
                 .host_tier = after % 2 == 0 ? "none" : "inclusive"},
                false);
    FailingReads::left = after;
    for (std::size_t i = 0; i < scenario.calls.size(); ++i) {
      try {
        EXPECT_EQ(rig.forward(scenario.calls[i]), scenario.expected[i]);
      } catch (const IoError& error) {
        EXPECT_NE(std::string(error.what()).find(path), std::string::npos) << error.what();
        ++failed;
      }
    }
    FailingReads::left = -1;
    for (std::size_t i = 0; i < scenario.calls.size(); ++i) {
      EXPECT_EQ(rig.forward(scenario.calls[i]), scenario.expected[i]) << "after the fault";
    }
  }
  std::swap(file_calls(), calls);
  std::filesystem::remove(path);
  EXPECT_GT(failed, 10);
  expect_nothing_left();
}

}  // namespace
}  // namespace sluice::testing
