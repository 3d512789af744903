#include "cache/policy.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "cache/slot_cache.h"

namespace sluice {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr PolicyShape kShape{.num_layers = 4, .max_experts = 8};

struct Event {
  std::int32_t layer;
  std::vector<std::int32_t> experts;
};

/// Replays events as the engine does: lease all residents, then load the rest, one step per visit
/// of layer 0. Knows nothing of policies.
class Replay {
 public:
  Replay(std::string_view policy, std::int32_t num_slots)
      : cache_(num_slots, make_policy(policy, kShape)) {}

  void event(const Event& event) {
    if (event.layer == 0) ++step_;
    std::vector<ExpertIdx> ids;
    for (const std::int32_t expert : event.experts) ids.push_back(ExpertIdx{expert});
    cache_.touch({.step = step_, .layer = LayerIdx{event.layer}, .experts = ids});
    std::vector<SlotLease> leases;
    std::vector<ExpertKey> missing;
    for (const std::int32_t expert : event.experts) {
      const ExpertKey key = make_key(event.layer, expert);
      if (std::optional<SlotLease> lease = cache_.find(key)) {
        leases.push_back(*std::move(lease));
        ++hits_;
      } else {
        missing.push_back(key);
      }
    }
    for (const ExpertKey key : missing) {
      ASSERT_TRUE(
          std::holds_alternative<SlotIdx>(cache_.begin_load(key, SlotCache::Purpose::kDemand)));
      cache_.finish_load(key);
      leases.push_back(*cache_.find(key));
    }
  }
  void events(const std::vector<Event>& all) {
    for (const Event& each : all) event(each);
  }
  [[nodiscard]] bool admits_hint(ExpertKey key) {
    const auto begun = cache_.begin_load(key, SlotCache::Purpose::kHint);
    if (std::holds_alternative<SlotIdx>(begun)) cache_.fail_load(key);
    return std::holds_alternative<SlotIdx>(begun);
  }
  [[nodiscard]] std::int32_t hits() const { return hits_; }
  [[nodiscard]] std::vector<std::pair<std::int32_t, std::int32_t>> residents() const {
    std::vector<std::pair<std::int32_t, std::int32_t>> keys;
    for (const auto& slot : cache_.snapshot())
      if (slot.state == SlotState::kReady)
        keys.emplace_back(to_int(slot.key.layer), to_int(slot.key.expert));
    std::sort(keys.begin(), keys.end());
    return keys;
  }

 private:
  SlotCache cache_;
  std::int64_t step_ = -1;
  std::int32_t hits_ = 0;
};

using Key = std::pair<std::int32_t, std::int32_t>;

// One layer, three slots, events worked out by hand (residents after each event):
//             {0,1}   {2}      {0,3}    {4}      {1}      {0}
//   lru       0 1     0 1 2    0 2 3    0 3 4    1 3 4    0 1 4
//   (2 of {0,2,3} is oldest for 4; 0 and 3 of one event: 0 is touched first, so 0 leaves for 1)
const std::vector<Event> kTrace = {{0, {0, 1}}, {0, {2}}, {0, {0, 3}},
                                   {0, {4}},    {0, {1}}, {0, {0}}};

TEST(LruPolicy, EvictsTheExpertTouchedLongestAgo) {
  Replay replay("lru", 3);
  replay.events({kTrace.begin(), kTrace.begin() + 4});
  EXPECT_THAT(replay.residents(), ElementsAre(Key{0, 0}, Key{0, 3}, Key{0, 4}));
  replay.event(kTrace[4]);
  EXPECT_THAT(replay.residents(), ElementsAre(Key{0, 1}, Key{0, 3}, Key{0, 4}));
  replay.event(kTrace[5]);
  EXPECT_THAT(replay.residents(), ElementsAre(Key{0, 0}, Key{0, 1}, Key{0, 4}));
  EXPECT_EQ(replay.hits(), 1);
}

TEST(LruPolicy, AHintCountsAsUsedWhenItGotItsSlot) {
  SlotCache cache(2, make_policy("lru", kShape));
  const auto load = [&](std::int32_t expert, SlotCache::Purpose purpose) {
    const auto slot = cache.begin_load(make_key(0, expert), purpose);
    cache.finish_load(make_key(0, expert));
    return std::get<SlotIdx>(slot);
  };
  const std::vector<ExpertIdx> first = {ExpertIdx{0}};
  cache.touch({.step = 0, .layer = LayerIdx{0}, .experts = first});
  (void)load(0, SlotCache::Purpose::kDemand);
  (void)load(1, SlotCache::Purpose::kHint);
  EXPECT_EQ(load(2, SlotCache::Purpose::kHint), SlotIdx{0})
      << "the fresh hint must not leave first";
}

// The same trace with h = 16, d = 2^(-1/16): before {4} (step 3) the counts of 0, 2, 3 are
// d^3 + d, d^2, d: 2 leaves. Before {1} (step 4): 0 has d^4 + d^2, 3 has d^2, 4 has d: 3 leaves.
// Before {0}: a hit.
TEST(DecayedLfuPolicy, EvictsTheSmallestDecayedCount) {
  Replay replay("decayed-lfu", 3);
  replay.events({kTrace.begin(), kTrace.begin() + 4});
  EXPECT_THAT(replay.residents(), ElementsAre(Key{0, 0}, Key{0, 3}, Key{0, 4}));
  replay.event(kTrace[4]);
  EXPECT_THAT(replay.residents(), ElementsAre(Key{0, 0}, Key{0, 1}, Key{0, 4}));
  replay.event(kTrace[5]);
  EXPECT_THAT(replay.residents(), ElementsAre(Key{0, 0}, Key{0, 1}, Key{0, 4}));
  EXPECT_EQ(replay.hits(), 2);
}

// Expert 0 is used at steps 0 and 1, expert 1 at step 3: with h = 1 the counts at step 4 are
// 2^-4 + 2^-3 = 0.19 and 0.5, with h = 16 they are 1.72 and 0.96.
TEST(DecayedLfuPolicy, TheHalfLifeDecidesHowLongUsesCount) {
  const std::vector<Event> trace = {{0, {0}}, {0, {0}}, {0, {}}, {0, {1}}, {0, {2}}};
  Replay quick("decayed-lfu:1", 2);
  quick.events(trace);
  EXPECT_THAT(quick.residents(), ElementsAre(Key{0, 1}, Key{0, 2}));
  Replay slow("decayed-lfu:16", 2);
  slow.events(trace);
  EXPECT_THAT(slow.residents(), ElementsAre(Key{0, 0}, Key{0, 2}));
}

TEST(DecayedLfuPolicy, APromptCountsAsAsManySteps) {
  // A prompt of 64 tokens: expert 0 in each, 1 in a half, 2 in one.
  const std::vector<ExpertIdx> experts{ExpertIdx{0}, ExpertIdx{1}, ExpertIdx{2}};
  const std::vector<std::int64_t> tokens{64, 32, 1};
  for (const int uses : {1, 8, 40}) {  // of expert 3, a step each, before the prompt
    const auto policy = make_policy("decayed-lfu:16", kShape);
    const std::vector<ExpertIdx> other{ExpertIdx{3}};
    for (int step = 1; step <= uses; ++step) {
      policy->on_event({.step = step, .layer = LayerIdx{0}, .experts = other});
    }
    policy->on_event({.step = uses + 1,
                      .layer = LayerIdx{0},
                      .experts = experts,
                      .tokens = tokens,
                      .num_tokens = 64});
    const auto leaves = [&](std::int32_t a, std::int32_t b) {
      const std::vector<Candidate> candidates{{.slot = SlotIdx{0}, .key = make_key(0, a)},
                                              {.slot = SlotIdx{1}, .key = make_key(0, b)}};
      return to_int(candidates[policy->victim(candidates)].key.expert);
    };
    EXPECT_EQ(leaves(0, 1), 1);
    EXPECT_EQ(leaves(1, 2), 2);
    EXPECT_EQ(leaves(0, 3), 3) << "as often as any step could use it";
    EXPECT_EQ(leaves(2, 3), 2);
    EXPECT_EQ(leaves(1, 3), uses == 40 ? 1 : 3) << uses << " uses";
  }
}

TEST(DecayedLfuPolicy, OfEqualCountsTheLowerIdStays) {
  Replay replay("decayed-lfu", 3);
  replay.events({{0, {5, 6, 7}}, {0, {1}}});
  EXPECT_THAT(replay.residents(), ElementsAre(Key{0, 1}, Key{0, 5}, Key{0, 6}));
}

TEST(DecayedLfuPolicy, CountsSurviveEvictionAndAnyNumberOfSteps) {
  SlotCache cache(2, make_policy("decayed-lfu", kShape));
  const auto use = [&](std::int64_t step, std::int32_t expert) {
    const std::vector<ExpertIdx> ids = {ExpertIdx{expert}};
    cache.touch({.step = step, .layer = LayerIdx{0}, .experts = ids});
    const ExpertKey key = make_key(0, expert);
    if (std::holds_alternative<SlotIdx>(cache.begin_load(key, SlotCache::Purpose::kDemand)))
      cache.finish_load(key);
  };
  constexpr std::int64_t kLate = std::int64_t{1} << 40;
  use(0, 0);
  use(kLate, 1);
  use(kLate + 1, 1);
  use(kLate + 1, 2);
  EXPECT_EQ(cache.state(make_key(0, 0)), SlotState::kEmpty);
  use(kLate + 2, 3);
  EXPECT_EQ(cache.state(make_key(0, 1)), SlotState::kReady) << "two uses outweigh one";
  EXPECT_EQ(cache.state(make_key(0, 2)), SlotState::kEmpty);
}

TEST(DecayedLfuPolicy, AdmitsAHintThatWouldOutweighItsVictimIfItCameTrue) {
  Replay replay("decayed-lfu", 1);
  replay.events({{0, {0}}, {0, {}}});
  EXPECT_TRUE(replay.admits_hint(make_key(0, 1))) << "1 against 0.96";
  Replay frequent("decayed-lfu", 1);
  frequent.events({{0, {0}}, {0, {0}}});
  EXPECT_FALSE(frequent.admits_hint(make_key(0, 1))) << "1 against 1.96";
}

TEST(StaticPolicy, TheFirstExpertsToArriveStay) {
  Replay replay("static", 3);
  replay.events(kTrace);
  EXPECT_THAT(replay.residents(), ElementsAre(Key{0, 0}, Key{0, 1}, Key{0, 4}));
  EXPECT_FALSE(replay.admits_hint(make_key(1, 1)));
}

// S = 4 layers, one use each of experts in layers 0, 2, 3, then layer 1 asks. Ours counts layers
// until the next turn, seen from layer 1: layer 2 has 1, 3 has 2, 0 has 3, so 0 leaves.
// As printed, it counts layers since: 0 has 1, 3 has 2, 2 has 3, so 2 leaves.
const std::vector<Event> kRound = {{0, {0}}, {2, {0}}, {3, {0}}, {1, {0}}};

TEST(EdgePolicy, EvictsTheExpertFarthestFromItsTurn) {
  Replay replay("edge", 3);
  replay.events(kRound);
  EXPECT_THAT(replay.residents(), ElementsAre(Key{1, 0}, Key{2, 0}, Key{3, 0}));
}

TEST(EdgePolicy, AsPrintedEvictsTheExpertWhoseTurnIsNext) {
  Replay replay("edge:printed", 3);
  replay.events(kRound);
  EXPECT_THAT(replay.residents(), ElementsAre(Key{0, 0}, Key{1, 0}, Key{3, 0}));
}

TEST(EdgePolicy, BothReadingsTakeTheCurrentLayerAsFarthest) {
  for (const char* const name : {"edge", "edge:printed"}) {
    Replay replay(name, 2);
    replay.events({{0, {1}}, {1, {0}}, {1, {2}}});  // seen from layer 1, layer 0 is at 3 or 1
    EXPECT_THAT(replay.residents(), ElementsAre(Key{0, 1}, Key{1, 2})) << name;
  }
}

/// A cache that holds (0, 0), (0, 1), used twice each, and (1, 0), which nobody has used yet.
std::unique_ptr<SlotCache> with_an_unused_expert(std::string_view policy,
                                                 SlotCache::Purpose purpose) {
  auto cache = std::make_unique<SlotCache>(3, make_policy(policy, kShape));
  const std::vector<ExpertIdx> ids = {ExpertIdx{0}, ExpertIdx{1}};
  for (std::int64_t step = 0; step < 2; ++step) {
    cache->touch({.step = step, .layer = LayerIdx{0}, .experts = ids});
  }
  for (const ExpertKey key : {make_key(0, 0), make_key(0, 1), make_key(1, 0)}) {
    const bool used = key.layer == LayerIdx{0};
    EXPECT_TRUE(std::holds_alternative<SlotIdx>(
        cache->begin_load(key, used ? SlotCache::Purpose::kDemand : purpose)));
    cache->finish_load(key);
  }
  return cache;
}

TEST(Policy, WhatAGuessBroughtIsWorthAUseUntilItsLayerHasRun) {
  for (const char* const name : {"decayed-lfu", "edge", "forecast", "lfru", "lfu"}) {
    const ExpertKey guessed = make_key(1, 0);
    const ExpertKey newcomer = make_key(2, 0);
    const auto hint = [&](SlotCache& cache) {
      return std::holds_alternative<SlotIdx>(cache.begin_load(newcomer, SlotCache::Purpose::kHint));
    };
    const auto demanded = with_an_unused_expert(name, SlotCache::Purpose::kDemand);
    EXPECT_TRUE(hint(*demanded)) << name << ": nobody has used it: any guess is worth more";
    const auto waiting = with_an_unused_expert(name, SlotCache::Purpose::kHint);
    EXPECT_FALSE(hint(*waiting)) << name << ": one guess is worth no more than the other";
    const auto refuted = with_an_unused_expert(name, SlotCache::Purpose::kHint);
    const std::vector<ExpertIdx> others = {ExpertIdx{5}};
    refuted->touch({.step = 1, .layer = LayerIdx{1}, .experts = others});
    EXPECT_TRUE(hint(*refuted)) << name;
    EXPECT_EQ(refuted->state(guessed), SlotState::kEmpty) << name;
  }
}

TEST(EdgePolicy, UsesOutweighDistance) {
  Replay replay("edge", 2);
  // Seen from layer 1: (0, 0) has 4 uses at distance 3, (2, 0) has 1 use at distance 1.
  replay.events({{0, {0}}, {0, {0}}, {0, {0}}, {0, {0}}, {2, {0}}, {1, {0}}});
  EXPECT_THAT(replay.residents(), ElementsAre(Key{0, 0}, Key{1, 0}));
}

TEST(MakePolicy, MakesEveryNameItLists) {
  for (const std::string& name : policy_names()) EXPECT_NE(make_policy(name, kShape), nullptr);
}

TEST(MakePolicy, AnUnknownNameIsAnsweredWithThoseThereAre) {
  try {
    (void)make_policy("mru", kShape);
    FAIL() << "mru made a policy";
  } catch (const ConfigError& error) {
    EXPECT_THAT(error.what(),
                HasSubstr("got \"mru\", expected one of decayed-lfu, edge, "
                          "edge:printed, fifo, forecast, forecast:always, least-stale, "
                          "lfru, lfu, lru, plec, s3-fifo, static"));
  }
  EXPECT_THROW((void)make_policy("", kShape), ConfigError);
  EXPECT_THROW((void)make_policy(std::string(1 << 20, 'x'), kShape), ConfigError);
}

TEST(MakePolicy, RefusesHalfLivesThatAreNoTime) {
  for (const char* const wrong :
       {"decayed-lfu:", "decayed-lfu:0", "decayed-lfu:-1", "decayed-lfu:nan", "decayed-lfu:inf",
        "decayed-lfu:1e400", "decayed-lfu:16x", "decayed-lfu: 16", "decayed-lfu:1e-300"})
    EXPECT_THROW((void)make_policy(wrong, kShape), ConfigError) << wrong;
}

TEST(MakePolicy, RefusesAShapeWithoutExperts) {
  EXPECT_THROW((void)make_policy("lru", {.num_layers = 0, .max_experts = 8}), ConfigError);
  EXPECT_THROW((void)make_policy("lru", {.num_layers = 4, .max_experts = -1}), ConfigError);
  EXPECT_THROW((void)make_policy("lru", {.num_layers = 4, .max_experts = 8, .num_slots = 0}),
               ConfigError);
}

TEST(Policy, AnExpertOutsideOfTheShapeIsAnInternalError) {
  for (const std::string& name : policy_names()) {
    SlotCache cache(1, make_policy(name, kShape));
    (void)cache.begin_load(make_key(0, 0), SlotCache::Purpose::kDemand);
    cache.finish_load(make_key(0, 0));
    const std::vector<ExpertIdx> ids = {ExpertIdx{8}};
    if (name != "static" && name != "fifo" && name != "plec") {
      EXPECT_THROW(cache.touch({.step = 0, .layer = LayerIdx{0}, .experts = ids}), InternalError);
    }
    if (name == "lru" || name == "static") {
      EXPECT_THROW((void)cache.begin_load(make_key(4, 0), SlotCache::Purpose::kDemand),
                   InternalError);
    }
  }
}

}  // namespace
}  // namespace sluice
