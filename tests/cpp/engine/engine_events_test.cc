// I2 to I4: what writers wait for, what kernels wait for, and when a lease ends.
#include <gtest/gtest.h>

#include "engine/plain.h"
#include "engine/rig.h"

namespace sluice::testing {
namespace {

constexpr StreamHandle kCompute{0};
constexpr StreamHandle kCopy{1};

/// One token that asks for the given experts of layer 0.
Call call_for(const ModelShape& model, const std::vector<std::int64_t>& experts) {
  std::mt19937_64 rng(11);
  Call call = make_call(model, 0,
                        {.num_tokens = 1, .top_k = static_cast<std::int64_t>(experts.size())}, rng);
  call.ids = experts;
  return call;
}

struct EngineEvents : ::testing::Test {
  ModelShape shape;
  Model model{shape, 3};

  [[nodiscard]] RigOptions standing_still(std::int64_t slots) const {
    return {.device_memory = model.slots(slots), .depth = 8, .events_pass_at_once = false};
  }
};

TEST_F(EngineEvents, AWriterWaitsForTheLastUseOfItsSlot) {
  Rig rig(model, standing_still(1));
  rig.on_drive = [&] { (void)rig.link().land(); };
  (void)rig.forward(call_for(shape, {0}));
  ASSERT_GT(rig.device().num_queued(kCompute), 0u) << "the kernel has not run yet";

  // The slot's next expert may not be written before the kernel that reads it has run.
  int refusals = 0;
  rig.link().clear_history();
  rig.on_drive = [&] {
    if (rig.link().land()) return;
    ++refusals;
    ASSERT_LT(refusals, 100);
    EXPECT_FALSE(rig.device().passed(rig.link().waiting().front().last_use));
    rig.device().run();
  };
  (void)rig.forward(call_for(shape, {1}));
  EXPECT_GT(refusals, 0);
  for (const ChunkCopy& copy : rig.link().history()) {
    EXPECT_NE(copy.last_use, EventHandle{}) << "chunk " << copy.chunk;
  }
}

TEST_F(EngineEvents, AWriterWaitsForTheLastUseThatACancelledLoadHasNotWaitedFor) {
  RigOptions options = standing_still(2);
  options.policy = "lru";
  options.depth = 4;  // two chunks of guesses at once: all that the better one can start
  Rig rig(model, options);
  rig.on_drive = [&] { (void)rig.link().land(); };
  (void)rig.forward(call_for(shape, {0, 1}));
  const std::vector<Hint> hints = {{.key = make_key(1, 0), .probability = 0.9},
                                   {.key = make_key(1, 1), .probability = 0.8}};
  rig.engine().hint(hints);
  for (const ChunkCopy& copy : rig.link().waiting()) ASSERT_EQ(copy.key, make_key(1, 0));

  // The worse guess makes room before its first chunk; the kernel of its slot has not run yet.
  int refusals = 0;
  rig.on_drive = [&] {
    if (rig.link().land(make_key(0, 5))) return;
    ASSERT_LT(++refusals, 100);
    rig.device().run();
  };
  (void)rig.forward(call_for(shape, {5}));
  EXPECT_GT(refusals, 0);
  rig.on_drive = nullptr;
  rig.engine().close();
  EXPECT_EQ(rig.device().num_live_events(), 0u);
}

TEST_F(EngineEvents, AKernelWaitsForTheReadyEventOfEachOfItsSlots) {
  Rig rig(model, standing_still(4));
  rig.on_drive = [&] { (void)rig.link().land(); };
  (void)rig.forward(call_for(shape, {2, 5}));
  EXPECT_EQ(rig.device().num_queued(kCompute), 4u)
      << "one lands after the other: two waits, two records";
  EXPECT_FALSE(rig.device().step(kCompute)) << "the ready events have not passed";
  while (rig.device().step(kCopy)) {
  }
  EXPECT_TRUE(rig.device().step(kCompute));

  // Once its bytes are there a hit costs no wait, and a call one record.
  rig.device().run();
  (void)rig.forward(call_for(shape, {2, 5}));
  EXPECT_EQ(rig.device().num_queued(kCompute), 1u);
}

TEST_F(EngineEvents, AHitThatHasNotLandedIsWaitedFor) {
  Rig rig(model, standing_still(4));
  rig.on_drive = [&] { (void)rig.link().land(); };
  (void)rig.forward(call_for(shape, {5}));
  (void)rig.forward(call_for(shape, {5}));
  EXPECT_EQ(rig.device().num_queued(kCompute), 4u) << "two calls, each a wait and a record";
}

TEST_F(EngineEvents, ALeaseEndsWithTheLaunchAndNotWithTheKernel) {
  Rig rig(model, standing_still(4));
  rig.on_drive = [&] { (void)rig.link().land(); };
  (void)rig.forward(call_for(shape, {0, 1}));
  while (rig.device().step(kCopy)) {
  }
  EXPECT_EQ(rig.num_leases(), 0);
  EXPECT_GT(rig.device().num_queued(kCompute), 0u) << "nobody waited for the kernels";
}

TEST_F(EngineEvents, EveryEventGoesBackToTheDevice) {
  Rig rig(model, standing_still(2));
  for (const std::int64_t expert : {0, 1, 2, 3, 0, 2}) {
    (void)rig.forward(call_for(shape, {expert, (expert + 1) % 8}));
  }
  EXPECT_LE(rig.device().num_live_events(), 4u) << "ready and last use of two slots";
  rig.engine().close();
  EXPECT_EQ(rig.device().num_live_events(), 0u);
  EXPECT_EQ(rig.device().live_bytes(), 0u) << "slabs are freed";
}

}  // namespace
}  // namespace sluice::testing
