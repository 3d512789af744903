// Law 4: guesses may be late, wrong or refused; they never block and what they cost is accounted.
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <utility>
#include <vector>

#include "engine/plain.h"
#include "engine/rig.h"

namespace sluice::testing {
namespace {

struct EngineHint : ::testing::Test {
  ModelShape shape;
  Model model{shape, 3};
  std::size_t expert_bytes = 0;

  EngineHint() {
    for (std::int32_t c = 0; c < model.store()->num_chunks(make_key(0, 0)); ++c)
      expert_bytes += model.store()->chunk_bytes(make_key(0, 0), c);
  }
  [[nodiscard]] Call call_for(const std::vector<std::int64_t>& experts) const {
    std::mt19937_64 rng(11);
    Call call = make_call(
        shape, 0, {.num_tokens = 1, .top_k = static_cast<std::int64_t>(experts.size())}, rng);
    call.ids = experts;
    return call;
  }
  static void hint(Rig& rig, std::int32_t layer, std::int32_t expert, double probability = 1.0,
                   Nanos deadline = kNever) {
    const Hint hint{
        .key = make_key(layer, expert), .probability = probability, .deadline = deadline};
    rig.engine().hint({&hint, 1});
  }
};

TEST_F(EngineHint, AGuessThatLandedInTimeIsAHitAndItsBytesAreUsed) {
  Rig rig(model, {.device_memory = model.slots(4)});
  hint(rig, 0, 2);
  rig.land_all();
  EXPECT_EQ(rig.engine().stats().bytes_read_hint_pending, expert_bytes);
  const Call call = call_for({2});
  EXPECT_EQ(rig.forward(call), PlainForward(model)(call));
  const EngineStats stats = rig.engine().stats();
  EXPECT_EQ(stats.hits, 1);
  EXPECT_EQ(stats.bytes_read_hint_used, expert_bytes);
  EXPECT_EQ(stats.bytes_read_hint_pending, 0u);
  EXPECT_EQ(stats.bytes_read, expert_bytes);
}

TEST_F(EngineHint, AGuessUnderWayIsJoinedNotReadAgain) {
  Rig rig(model, {.device_memory = model.slots(4), .depth = 1});
  hint(rig, 0, 2);
  const Call call = call_for({2, 3});
  EXPECT_EQ(rig.forward(call), PlainForward(model)(call));
  const EngineStats stats = rig.engine().stats();
  EXPECT_EQ(stats.late, 1);
  EXPECT_EQ(stats.misses, 1);
  EXPECT_EQ(stats.bytes_read_hint_used, expert_bytes);
  EXPECT_EQ(stats.bytes_read_demand, expert_bytes);
}

TEST_F(EngineHint, AGuessTakesNoSlotWhileADemandIsOnItsWay) {
  Rig rig(model, {.device_memory = model.slots(2), .depth = 4});
  (void)rig.forward(call_for({4, 5}));
  bool asked = false;
  rig.on_drive = [&] {
    if (!asked) {
      asked = true;
      hint(rig, 1, 2);
      for (const ChunkCopy& copy : rig.link().waiting()) EXPECT_EQ(copy.key, make_key(0, 6));
    }
    rig.land_one();
  };
  const Call call = call_for({6});
  EXPECT_EQ(rig.forward(call), PlainForward(model)(call));
  EXPECT_TRUE(asked);
  rig.land_all();
  EXPECT_GT(rig.engine().stats().bytes_read_hint_pending, 0u) << "it came when the link was idle";
}

TEST_F(EngineHint, AWrongGuessIsWastedOnceItIsEvicted) {
  Rig rig(model, {.device_memory = model.slots(1)});
  hint(rig, 1, 2);
  rig.land_all();
  (void)rig.forward(call_for({5}));
  const EngineStats stats = rig.engine().stats();
  EXPECT_EQ(stats.bytes_read_hint_wasted, expert_bytes);
  EXPECT_EQ(stats.evictions, 1);
}

TEST_F(EngineHint, AGuessThatFailsIsWastedAlsoWhenACallHasJoinedIt) {
  Rig rig(model, {.device_memory = model.slots(4), .depth = 1});
  hint(rig, 0, 2);
  rig.on_drive = [&] { (void)rig.link().fail(make_key(0, 2), "planted failure"); };
  const Call call = call_for({2});
  EXPECT_THROW((void)rig.forward(call), std::runtime_error);
  const EngineStats stats = rig.engine().stats();
  EXPECT_EQ(stats.late, 1);
  EXPECT_GT(stats.bytes_read, 0u);
  EXPECT_EQ(stats.bytes_read_hint_wasted, stats.bytes_read);
  EXPECT_EQ(stats.bytes_read_hint_used, 0u);
  EXPECT_EQ(stats.hints_dropped, 1);
}

TEST_F(EngineHint, UnknownExpertsAndNumbersThatAreNoneAreDropped) {
  Rig rig(model, {.device_memory = model.slots(4)});
  hint(rig, -1, 0);
  hint(rig, 2, 0);
  hint(rig, 0, 8);
  hint(rig, 0, -1);
  hint(rig, 0, 0, std::nan(""));
  hint(rig, 0, 0, 0.0);
  hint(rig, 0, 0, 1.0, -5);  // its deadline has passed
  const EngineStats stats = rig.engine().stats();
  EXPECT_EQ(stats.hints, 7);
  EXPECT_EQ(stats.hints_dropped, 7);
  EXPECT_TRUE(rig.link().history().empty());
}

TEST_F(EngineHint, AtMostHalfOfTheLinkCarriesGuessesTheBestFirst) {
  Rig rig(model, {.device_memory = model.slots(16), .depth = 4});
  std::vector<Hint> hints;
  for (std::int32_t e = 0; e < 8; ++e)
    hints.push_back({.key = make_key(1, e), .probability = 0.1 + 0.1 * e});
  rig.engine().hint(hints);
  std::set<std::int32_t> experts;
  for (const ChunkCopy& copy : rig.link().waiting()) experts.insert(to_int(copy.key.expert));
  EXPECT_LE(rig.link().waiting().size(), 2u);
  EXPECT_TRUE(experts.contains(7));
  rig.land_all();
  EXPECT_EQ(rig.engine().stats().bytes_read_hint_pending, 8 * expert_bytes) << "none was lost";
}

TEST_F(EngineHint, GuessesThatHoldEverySlotMakeRoomForDemands) {
  for (const int depth : {1, 2, 4, 8}) {
    Rig rig(model, {.device_memory = model.slots(2), .depth = depth});
    hint(rig, 1, 0, 0.9);
    hint(rig, 1, 1, 0.8);
    const Call call = call_for({4, 5, 6});
    EXPECT_EQ(rig.forward(call), PlainForward(model)(call)) << "depth " << depth;
    EXPECT_EQ(rig.engine().stats().misses, 3);
  }
}

TEST_F(EngineHint, NoGuessTakesASlotWhileADemandHasNone) {
  Rig rig(model, {.device_memory = model.slots(1), .policy = "lru", .depth = 2});
  int guesses_started = 0;
  rig.on_drive = [&] {
    hint(rig, 1, 3);
    for (const ChunkCopy& copy : rig.link().waiting())
      if (copy.priority != Priority::kDemand) ++guesses_started;
    rig.land_one();
  };
  (void)rig.forward(call_for({0, 1, 2, 3}));
  rig.on_drive = nullptr;
  EXPECT_EQ(guesses_started, 0);
  rig.land_all();
  EXPECT_GT(rig.engine().stats().bytes_read_hint_pending, 0u) << "afterwards it may";
}

// ExpertFlow's example (2410.17954 §3.4): three experts wanted of layer 0, two of layer 1, four
// slots. They fill in execution order, across layers; what has run gives its slot to the next.
TEST_F(EngineHint, PlecFillsInExecutionOrderAndReusesSlotsAsLayersEnd) {
  Rig rig(model, {.device_memory = model.slots(4), .policy = "plec", .depth = 1});
  const std::vector<ExpertKey> plan{make_key(0, 2), make_key(0, 3), make_key(0, 4), make_key(1, 2),
                                    make_key(1, 3)};
  std::vector<float> expected(16, 0.0F);
  std::vector<Hint> hints;
  for (const ExpertKey key : plan) {
    const std::int32_t layer = to_int(key.layer);
    expected[static_cast<std::size_t>(8 * layer + to_int(key.expert))] = 1.0F;
    // The later layer's are surer, and come second all the same.
    hints.push_back({.key = key,
                     .probability = 0.6 + 0.1 * layer - 0.01 * to_int(key.expert),
                     .deadline = kNever - 2 + layer});
  }
  std::ranges::reverse(hints);
  rig.engine().publish(LayerIdx{0}, expected);
  rig.engine().hint(hints);
  rig.land_all();
  const auto residents = [&] {
    std::vector<ExpertKey> found;
    const auto pools = rig.engine().residency();
    for (const SlotCache::SlotView& view : pools.front()) {
      if (view.state == SlotState::kReady) found.push_back(view.key);
    }
    std::ranges::sort(
        found, {}, [](ExpertKey key) { return std::pair(to_int(key.layer), to_int(key.expert)); });
    return found;
  };
  EXPECT_EQ(residents(), (std::vector<ExpertKey>(plan.begin(), plan.end() - 1)));
  EXPECT_EQ(rig.engine().stats().hints_dropped, 0);
  const Call call = call_for({2, 3, 4});
  EXPECT_EQ(rig.forward(call), PlainForward(model)(call));
  rig.land_all();
  const std::vector<ExpertKey> after = residents();
  EXPECT_EQ(rig.engine().stats().hits, 3);
  EXPECT_TRUE(std::ranges::count(after, plan[3]) == 1 && std::ranges::count(after, plan[4]) == 1);
  EXPECT_EQ(after.size(), 4u) << "and nobody else had to go";
  EXPECT_EQ(rig.engine().stats().evictions, 1);
}

TEST_F(EngineHint, DrainCancelsGuessesAndLeavesNothingInFlight) {
  Rig rig(model, {.device_memory = model.slots(4), .depth = 2});
  for (std::int32_t e = 0; e < 6; ++e) hint(rig, 1, e);
  rig.engine().drain();
  EXPECT_TRUE(rig.link().waiting().empty());
  const EngineStats stats = rig.engine().stats();
  EXPECT_EQ(stats.hints_dropped, 6);
  EXPECT_EQ(stats.bytes_read, stats.bytes_read_hint_wasted + stats.bytes_read_hint_pending);
  hint(rig, 1, 0);
  rig.land_all();
  EXPECT_EQ(rig.engine().stats().bytes_read_hint_pending, expert_bytes) << "guesses go on";
}

}  // namespace
}  // namespace sluice::testing
