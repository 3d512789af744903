// Waves and the streaming ring: what a call that needs many experts does to the cache.
#include <gtest/gtest.h>

#include <set>

#include "engine/plain.h"
#include "engine/rig.h"

namespace sluice::testing {
namespace {

/// A call of one layer whose tokens ask for each of `experts`, one expert per token.
Call call_for(const ModelShape& shape, std::int32_t layer,
              const std::vector<std::int64_t>& experts) {
  std::mt19937_64 rng(5);
  Call call = make_call(shape, layer,
                        {.num_tokens = static_cast<std::int64_t>(experts.size()), .top_k = 1}, rng);
  call.ids = experts;
  return call;
}
std::vector<std::int64_t> first(std::int64_t count) {
  std::vector<std::int64_t> experts;
  for (std::int64_t e = 0; e < count; ++e) experts.push_back(e);
  return experts;
}
std::int64_t residents(Rig& rig, std::int32_t layer) {
  std::int64_t count = 0;
  const auto pools = rig.engine().residency();
  for (const SlotCache::SlotView& view : pools[0])
    count += view.state == SlotState::kReady && view.key.layer == LayerIdx{layer};
  return count;
}

TEST(EngineWave, OneSlotServesAnyLayerInAsManyWavesAsExperts) {
  const ModelShape shape;
  const Model model(shape, 1);
  Rig rig(model, {.device_memory = model.slots(1)});
  const Call call = call_for(shape, 0, first(4));
  EXPECT_EQ(rig.forward(call), PlainForward(model)(call));
  const EngineStats stats = rig.engine().stats();
  EXPECT_EQ(stats.waves, 4);
  EXPECT_EQ(stats.degradations.at("waves_at_decode"), 1);
  EXPECT_EQ(stats.peak_resident_bytes, model.slots(1));
}

TEST(EngineWave, ACallThatFitsIsOneWave) {
  const ModelShape shape;
  const Model model(shape, 1);
  Rig rig(model, {.device_memory = model.slots(4)});
  (void)rig.forward(call_for(shape, 0, first(4)));
  (void)rig.forward(call_for(shape, 0, first(4)));
  (void)rig.forward(call_for(shape, 0, {}));
  EXPECT_EQ(rig.engine().stats().waves, 3);
  EXPECT_FALSE(rig.engine().stats().degradations.contains("waves_at_decode"));
}

TEST(EngineWave, ALargeCallStreamsThroughARingAndLeavesTheCacheItsResidents) {
  ModelShape shape{.num_experts = 16};
  const Model model(shape, 1);
  for (const std::string& policy : policy_names()) {
    Rig rig(model, {.device_memory = model.slots(12), .policy = policy});
    for (int i = 0; i < 4; ++i) {
      (void)rig.forward(call_for(shape, 1, {0, 1, 2, 3, 4}));
      (void)rig.forward(call_for(shape, 1, {5, 6, 7, 8, 9}));
    }
    ASSERT_EQ(residents(rig, 1), 10) << policy;
    const Call prefill = call_for(shape, 0, first(16));
    EXPECT_EQ(rig.forward(prefill), PlainForward(model)(prefill)) << policy;
    // Two slots were free, the ring is max(2, 12 / 8) = 2 more.
    EXPECT_GE(residents(rig, 1), 8) << policy;
    EXPECT_FALSE(rig.engine().stats().degradations.contains("waves_at_decode"));
  }
}

TEST(EngineWave, AStreamComputesItsOwnResidentsFirstAndReadsThemNotAgain) {
  ModelShape shape{.num_experts = 16};
  const Model model(shape, 1);
  Rig rig(model, {.device_memory = model.slots(8)});
  (void)rig.forward(call_for(shape, 0, {3, 5, 7, 9, 11, 13}));
  rig.link().clear_history();
  (void)rig.forward(call_for(shape, 0, first(16)));
  std::set<std::int32_t> read;
  for (const ChunkCopy& copy : rig.link().history()) read.insert(to_int(copy.key.expert));
  EXPECT_EQ(read.size(), 10u);
  for (const std::int32_t resident : {3, 5, 7, 9, 11, 13}) EXPECT_FALSE(read.contains(resident));
  EXPECT_EQ(rig.engine().stats().hits, 6);
}

TEST(EngineWave, AStreamLoadsExpertsInTheOrderOfTokensWaiting) {
  ModelShape shape{.num_experts = 8};
  const Model model(shape, 1);
  Rig rig(model, {.device_memory = model.slots(8), .depth = 1});
  (void)rig.forward(call_for(shape, 0, {0, 1, 1, 2, 3, 3, 3, 4, 4, 4, 4, 5}));
  std::vector<std::int32_t> order;
  for (const ChunkCopy& copy : rig.link().history())
    if (copy.chunk == 0) order.push_back(to_int(copy.key.expert));
  EXPECT_EQ(order, (std::vector<std::int32_t>{4, 3, 1, 0, 2, 5}));
}

TEST(EngineWave, WhereTheCacheIsSmallTheRingIsThePool) {
  ModelShape shape{.num_experts = 16};
  const Model model(shape, 1);
  Rig rig(model, {.device_memory = model.slots(3)});  // 3 < 16 / 4
  (void)rig.forward(call_for(shape, 1, {0, 1, 2}));
  const Call prefill = call_for(shape, 0, first(16));
  EXPECT_EQ(rig.forward(prefill), PlainForward(model)(prefill));
  EXPECT_EQ(residents(rig, 0), 3);
  EXPECT_EQ(rig.engine().stats().waves, 1 + 6) << "16 experts through 3 slots";
}

TEST(EngineWave, ManyTokensOfOneExpertAreOneProblemWhateverTheWave) {
  const ModelShape shape;
  const Model model(shape, 1);
  std::vector<std::int64_t> experts = {2, 3, 5, 6, 7};
  for (std::int64_t i = 0; i < kFewTokens + 2; ++i) {
    experts.insert(experts.end(), {0, 1});
    if (i < kFewTokens) experts.push_back(4);  // just on the other side of the switch
  }
  const Call call = call_for(shape, 0, experts);
  const auto expected = PlainForward(model)(call);
  for (const std::int64_t slots : {1, 2, 3, 16}) {
    Rig rig(model, {.device_memory = model.slots(slots)});
    EXPECT_EQ(rig.forward(call), expected) << slots;
  }
}

}  // namespace
}  // namespace sluice::testing
