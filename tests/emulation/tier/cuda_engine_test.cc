// The engine on the fake device: law 1 under every schedule, budgets to the byte, host waits, and
// what callers may do with streams.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "engine/plain.h"
#include "engine/shapes.h"
#include "kernels/expert_gemv.h"
#include "tests/emulation/tier/cuda_rig.h"

namespace sluice::testing {
namespace {

/// Few and many tokens, odd entries, wide activations; both layers in turn.
std::vector<Call> make_calls(const ModelShape& model, std::mt19937_64& rng) {
  std::vector<Call> calls;
  for (const std::int64_t tokens : {1, 3, 40, 2, 0}) {
    for (std::int32_t layer = 0; layer < model.num_layers; ++layer) {
      const bool wide = tokens == 2;
      calls.push_back(make_call(model, layer,
                                {.num_tokens = tokens,
                                 .top_k = 3,
                                 .activations = wide ? DType::kF32 : model.dtype,
                                 .weights_dtype = layer == 0 ? DType::kF32 : model.dtype,
                                 .odd_entries = tokens != 1},
                                rng));
    }
  }
  return calls;
}

EngineOptions options_of(const Model& model, std::int64_t slots, std::int64_t host_slots) {
  return {.device_memory = model.slots(slots), .host_memory = model.slots(host_slots)};
}

/// Relative to the largest value: two roundings of the activations' type and its sums.
void expect_near(const Call& call, const std::vector<std::byte>& got,
                 const std::vector<std::byte>& expected) {
  const auto count = static_cast<std::int64_t>(got.size() / element_bytes(call.activations));
  std::vector<float> a(static_cast<std::size_t>(count));
  std::vector<float> b(a.size());
  widen(call.activations, got.data(), a.data(), count);
  widen(call.activations, expected.data(), b.data(), count);
  float largest = 0;
  for (const float value : b) largest = std::max(largest, std::abs(value));
  const float unit = call.activations == DType::kBF16  ? 0x1p-8f
                     : call.activations == DType::kF16 ? 0x1p-11f
                                                       : 0x1p-22f;
  for (std::size_t i = 0; i < a.size(); ++i) {
    ASSERT_NEAR(a[i], b[i], 8 * unit * largest) << "value " << i;
  }
}

class CudaEngine : public ::testing::TestWithParam<std::size_t> {};

TEST_P(CudaEngine, GivesTheSameBitsInEveryScheduleAndTheHostsWithinRounding) {
  const ModelShape shape = varied_shapes()[GetParam()];
  const Model model(shape, 7 + GetParam());
  std::mt19937_64 rng(11);
  const std::vector<Call> calls = make_calls(shape, rng);
  PlainForward plain(model);
  std::vector<std::vector<std::byte>> first;
  int run = 0;
  for (const Schedule& schedule : all_schedules()) {
    SCOPED_TRACE(text(schedule));
    begin(schedule);
    {
      EngineOptions options =
          options_of(model, std::array{1, 16, 5, 2}[run % 4], std::array{16, 3, 8}[run % 3]);
      if (run % 5 == 4) options.host_tier = "none";
      if (run % 7 == 3) options.pinned_cap = 0;
      if (run % 2 == 1) options.prefill = "cache";
      ++run;
      CudaRig rig(model, options, schedule.user_stream);
      for (int round = 0; round < 2; ++round) {
        for (std::size_t c = 0; c < calls.size(); ++c) {
          rig.engine().hint(std::array{Hint{.key = make_key(static_cast<std::int32_t>(rng() % 2),
                                                            static_cast<std::int32_t>(rng() % 8)),
                                            .probability = 0.5}});
          const std::vector<std::byte> out = rig.forward(calls[c]);
          if (first.size() == c) {
            first.push_back(out);
            expect_near(calls[c], out, plain(calls[c]));
          }
          ASSERT_EQ(out, first[c]) << "call " << c << " of round " << round;
        }
      }
      const EngineStats stats = rig.engine().stats();
      EXPECT_EQ(stats.hits + stats.late + stats.misses, stats.requests);
    }
    expect_nothing_left();
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, CudaEngine,
                         ::testing::Range(std::size_t{0}, varied_shapes().size()));

TEST(CudaEngineBudget, IsKeptToTheByteByTheAllocatorsOwnCount) {
  const ModelShape shape{.dtype = DType::kBF16};
  const Model model(shape, 3);
  std::mt19937_64 rng(5);
  const Call call = make_call(shape, 0, {.num_tokens = 40, .activations = DType::kBF16}, rng);
  for (int round = 0; round < 10; ++round) {
    begin({.seed = static_cast<std::uint64_t>(round)});
    {
      EngineOptions options = options_of(model, 3, 6);
      options.device_memory += 100;  // what no slot fits into stays unused
      CudaRig rig(model, options, false);
      EXPECT_EQ(fake::stats().device_bytes, model.slots(3));
      EXPECT_LE(fake::stats().device_bytes, options.device_memory);
      (void)rig.forward(call);
      const EngineStats stats = rig.engine().stats();
      EXPECT_EQ(stats.slab_bytes, model.slots(3));
      EXPECT_EQ(stats.host_tier_bytes, model.slots(6));
      EXPECT_LE(stats.peak_resident_bytes, options.device_memory);
      // Beside the slots there is scratch on the device, and pinned memory for the ids.
      EXPECT_EQ(fake::stats().device_bytes - model.slots(3) + fake::stats().registered_bytes -
                    stats.pinned_bytes,
                stats.workspace_bytes);
      // Not at the engine's end, which a session that somebody still holds puts off.
      rig.engine().close();
      const fake::Stats left = fake::stats();
      EXPECT_EQ(left.device_bytes + left.pinned_bytes + left.registered_bytes, 0u);
      const EngineStats closed = rig.engine().stats();
      EXPECT_EQ(closed.slab_bytes + closed.workspace_bytes, 0u);
    }
    expect_nothing_left();
  }
}

TEST(CudaEngineWaits, OnlyForTheIdsWhenEverythingHits) {
  const ModelShape shape{.dtype = DType::kBF16};
  const Model model(shape, 3);
  std::mt19937_64 rng(5);
  begin({.policy = fake::Policy::kLazy});
  {
    CudaRig rig(model, options_of(model, 16, 16), true);
    std::vector<Call> calls;
    for (std::int32_t layer = 0; layer < 2; ++layer) {
      calls.push_back(
          make_call(shape, layer, {.num_tokens = 24, .activations = DType::kBF16}, rng));
    }
    for (int round = 0; round < 2; ++round) {
      for (const Call& call : calls) {
        const CallOnDevice on_device(call, rig.stream());
        const std::size_t mark = fake::num_calls();
        const EngineStats before = rig.engine().stats();
        rig.engine().forward(on_device.args());
        if (round == 1) {
          EXPECT_EQ(rig.engine().stats().misses, before.misses);
          const std::vector<std::string> waits = fake::host_waits_since(mark);
          ASSERT_EQ(waits.size(), 1u);
          EXPECT_EQ(waits[0].find("cudaEventSynchronize"), 0u) << waits[0];
          // Residents that arrived long ago cost no wait of the stream, and all of them one record.
          int num_waits = 0;
          int num_records = 0;
          const std::vector<fake::Call> log = fake::call_log();
          for (std::size_t i = mark; i < log.size(); ++i) {
            num_waits += log[i].api == fake::Api::kStreamWaitEvent ? 1 : 0;
            num_records += log[i].api == fake::Api::kEventRecord ? 1 : 0;
          }
          EXPECT_EQ(num_waits, 0);
          EXPECT_EQ(num_records, 3) << "behind the ids, the slots' last use, the scratch's";
        }
        (void)on_device.out();
      }
    }
  }
  expect_nothing_left();
}

TEST(CudaEngineStreams, MayChangeFromCallToCall) {
  const ModelShape shape{.dtype = DType::kF32};
  const Model model(shape, 3);
  std::mt19937_64 rng(5);
  std::vector<Call> calls;
  for (int i = 0; i < 6; ++i) {
    calls.push_back(make_call(shape, i % 2, {.num_tokens = 4}, rng));
  }
  for (const Schedule& schedule : all_schedules()) {
    SCOPED_TRACE(text(schedule));
    begin(schedule);
    {
      std::array<cudaStream_t, 3> streams{};  // the first is the legacy stream
      for (int i = 1; i < 3; ++i) {
        must(cudaStreamCreateWithFlags(&streams[static_cast<std::size_t>(i)],
                                       cudaStreamNonBlocking));
      }
      CudaRig rig(model, options_of(model, 2, 5), false);
      std::vector<std::unique_ptr<CallOnDevice>> on_device;
      for (std::size_t i = 0; i < calls.size(); ++i) {
        on_device.push_back(std::make_unique<CallOnDevice>(calls[i], streams[i % 3]));
        rig.engine().forward(on_device.back()->args());  // no wait between the streams
      }
      CudaRig other(model, options_of(model, 16, 16), false);
      for (std::size_t i = 0; i < calls.size(); ++i) {
        EXPECT_EQ(on_device[i]->out(), other.forward(calls[i])) << "call " << i;
      }
      on_device.clear();
      rig.engine().close();
      for (int i = 1; i < 3; ++i) must(cudaStreamDestroy(streams[static_cast<std::size_t>(i)]));
    }
    expect_nothing_left();
  }
}

TEST(CudaEngineStreams, ACaptureThatSluiceDidNotStartIsRefused) {
  const ModelShape shape{.dtype = DType::kF32};
  const Model model(shape, 3);
  std::mt19937_64 rng(5);
  begin({});
  {
    CudaRig rig(model, options_of(model, 16, 16), true);
    const Call call = make_call(shape, 0, {}, rng);
    const CallOnDevice on_device(call, rig.stream());
    must(cudaStreamBeginCapture(rig.stream(), cudaStreamCaptureModeThreadLocal));
    try {
      rig.engine().forward(on_device.args());
      ADD_FAILURE() << "captured";
    } catch (const ConfigError& error) {
      EXPECT_NE(std::string(error.what()).find("captured"), std::string::npos) << error.what();
    }
    cudaGraph_t graph = nullptr;
    must(cudaStreamEndCapture(rig.stream(), &graph));
    must(cudaGraphDestroy(graph));
    rig.engine().forward(on_device.args());
    (void)on_device.out();
  }
  expect_nothing_left();
}

TEST(CudaEngineInput, WidthsAndPointersThatKernelsCannotReadAreRefused) {
  ModelShape shape{.hidden = 36, .dtype = DType::kBF16};  // not a multiple of 8
  shape.hidden = 36;
  const Model model(shape, 3);
  std::mt19937_64 rng(5);
  begin({});
  {
    CudaRig rig(model, options_of(model, 16, 16), false);
    const Call call = make_call(shape, 0, {.activations = DType::kBF16}, rng);
    try {
      (void)rig.forward(call);
      ADD_FAILURE() << "computed";
    } catch (const ConfigError& error) {
      EXPECT_NE(std::string(error.what()).find("36"), std::string::npos) << error.what();
    }
  }
  expect_nothing_left();
}

TEST(CudaEngineHostTier, FillsPinsAndServesWithoutTheStore) {
  const ModelShape shape{.dtype = DType::kBF16};
  const Model model(shape, 3);
  std::mt19937_64 rng(5);
  begin({});
  {
    CudaRig rig(model, options_of(model, 2, 16), false);
    // Nobody asks for anything: it fills by itself, on the readers' threads.
    for (int i = 0; i < 2000; ++i) {
      const HostTierProgress progress = rig.engine().host_tier();
      if (progress.pinned_bytes == progress.capacity_bytes) break;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    EXPECT_EQ(rig.engine().host_tier().filled_bytes, model.slots(16));
    EXPECT_EQ(rig.engine().host_tier().pinned_bytes, model.slots(16));
    const std::uint64_t read = model.store()->counters().memory_bytes;
    for (int i = 0; i < 6; ++i) {
      (void)rig.forward(make_call(shape, i % 2, {.activations = DType::kBF16}, rng));
    }
    EXPECT_EQ(model.store()->counters().memory_bytes, read) << "the store was read again";
    EXPECT_EQ(rig.engine().stats().host_misses, 0);
    EXPECT_EQ(rig.engine().stats().degradations.count("pageable_copy_bytes"), 0u);
  }
  expect_nothing_left();
}

TEST(CudaEnginePrefill, LeavesTheExpertsThatItUsedMost) {
  const ModelShape shape{.num_layers = 1, .num_experts = 16, .dtype = DType::kBF16};
  const Model model(shape, 3);
  std::mt19937_64 rng(5);
  begin({});
  {
    CudaRig rig(model, options_of(model, 6, 16), false);
    // Expert e is asked for by e + 1 tokens.
    Call call =
        make_call(shape, 0, {.num_tokens = 136, .top_k = 1, .activations = DType::kBF16}, rng);
    call.ids.clear();
    for (std::int64_t e = 0; e < 16; ++e) {
      for (std::int64_t t = 0; t <= e; ++t) call.ids.push_back(e);
    }
    // First something else, so that the slots are full of what the prompt uses least.
    for (std::int64_t first = 0; first < 6; first += 2) {
      Call few = make_call(shape, 0, {.num_tokens = 1, .activations = DType::kBF16}, rng);
      few.ids = {first, first + 1};
      (void)rig.forward(few);
    }
    (void)rig.forward(call);
    const auto is_warm = [&] {
      int warm = 0;
      const auto pools = rig.engine().residency();
      for (const SlotCache::SlotView& view : pools[0]) {
        warm += view.state == SlotState::kReady && to_int(view.key.expert) >= 10 ? 1 : 0;
      }
      return warm == 6;
    };
    for (int i = 0; i < 2000 && !is_warm(); ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    EXPECT_TRUE(is_warm());
    const EngineStats before = rig.engine().stats();
    Call next = make_call(shape, 0, {.num_tokens = 1, .activations = DType::kBF16}, rng);
    next.ids = {11, 15};
    (void)rig.forward(next);
    EXPECT_EQ(rig.engine().stats().misses, before.misses);
  }
  expect_nothing_left();
}

TEST(CudaEngineHostTier, APinThatIsRefusedIsCountedAndServesAllTheSame) {
  const ModelShape shape{.dtype = DType::kBF16};
  const Model model(shape, 3);
  std::mt19937_64 rng(5);
  begin({}, {.pinned_bytes = 64 * 1024});
  {
    CudaRig rig(model, options_of(model, 2, 16), false);
    for (int i = 0; i < 6; ++i) {
      const Call call = make_call(shape, i % 2, {.activations = DType::kBF16}, rng);
      const CallOnDevice on_device(call, rig.stream());
      const std::uint64_t before = fake::stats().pageable_copies;
      rig.engine().forward(on_device.args());
      rig.engine().drain();
      EXPECT_EQ(fake::stats().pageable_copies, before) << "staging is ours, never the driver's";
      (void)on_device.out();
    }
    const EngineStats stats = rig.engine().stats();
    EXPECT_EQ(stats.pinned_bytes, 0u);
    EXPECT_GT(stats.degradations.at("pageable_copy_bytes"), 0);
  }
  expect_nothing_left();
}

}  // namespace
}  // namespace sluice::testing
