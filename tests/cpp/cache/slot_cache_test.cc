#include "cache/slot_cache.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <climits>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"

namespace sluice {
namespace {

using ::testing::HasSubstr;

ExpertKey key(std::int32_t expert) { return make_key(0, expert); }

SlotCache make_cache(std::int32_t num_slots, std::string_view policy = "lru") {
  return SlotCache(num_slots, make_policy(policy, {.num_layers = 2, .max_experts = 16}));
}

Refusal refusal(const std::variant<SlotIdx, Refusal>& result) { return std::get<Refusal>(result); }

SlotIdx load(SlotCache& cache, ExpertKey expert) {
  const auto slot = cache.begin_load(expert, SlotCache::Purpose::kDemand);
  cache.finish_load(expert);
  return std::get<SlotIdx>(slot);
}

void touch(SlotCache& cache, std::int64_t step, std::vector<std::int32_t> experts) {
  std::vector<ExpertIdx> ids;
  for (const std::int32_t expert : experts) ids.push_back(ExpertIdx{expert});
  cache.touch({.step = step, .layer = LayerIdx{0}, .experts = ids});
}

TEST(SlotCache, ALoadGoesFromEmptyOverLoadingToReady) {
  SlotCache cache = make_cache(1);
  EXPECT_EQ(cache.state(key(3)), SlotState::kEmpty);
  EXPECT_EQ(std::get<SlotIdx>(cache.begin_load(key(3), SlotCache::Purpose::kDemand)), SlotIdx{0});
  EXPECT_EQ(cache.state(key(3)), SlotState::kLoading);
  EXPECT_FALSE(cache.find(key(3)).has_value()) << "a loading expert must not be leased";
  cache.finish_load(key(3));
  EXPECT_EQ(cache.state(key(3)), SlotState::kReady);
  const std::optional<SlotLease> lease = cache.find(key(3));
  ASSERT_TRUE(lease.has_value());
  EXPECT_EQ(lease->slot(), SlotIdx{0});
}

TEST(SlotCache, AFailedLoadEmptiesItsSlotAndNothingElse) {
  SlotCache cache = make_cache(2);
  (void)load(cache, key(0));
  ASSERT_TRUE(
      std::holds_alternative<SlotIdx>(cache.begin_load(key(1), SlotCache::Purpose::kDemand)));
  cache.fail_load(key(1));
  EXPECT_EQ(cache.state(key(1)), SlotState::kEmpty);
  EXPECT_FALSE(cache.find(key(1)).has_value());
  EXPECT_EQ(cache.snapshot()[1].state, SlotState::kEmpty);
  EXPECT_TRUE(cache.find(key(0)).has_value());
}

TEST(SlotCache, NeverEvictsALeasedExpert) {
  SlotCache cache = make_cache(2);
  (void)load(cache, key(0));
  (void)load(cache, key(1));
  std::optional<SlotLease> oldest = cache.find(key(0));
  EXPECT_EQ(load(cache, key(2)), SlotIdx{1}) << "the leased one is older, and must stay";
  std::optional<SlotLease> newest = cache.find(key(2));
  EXPECT_EQ(refusal(cache.begin_load(key(3), SlotCache::Purpose::kDemand)), Refusal::kLeased);
  EXPECT_TRUE(cache.find(key(0)).has_value());
  oldest->reset();
  EXPECT_EQ(load(cache, key(3)), SlotIdx{0});
}

TEST(SlotCache, NeverEvictsALoadingExpert) {
  SlotCache cache = make_cache(1);
  (void)cache.begin_load(key(0), SlotCache::Purpose::kHint);
  EXPECT_EQ(refusal(cache.begin_load(key(1), SlotCache::Purpose::kDemand)), Refusal::kLeased);
  EXPECT_EQ(cache.state(key(0)), SlotState::kLoading);
}

TEST(SlotCache, ASecondLoadOfAnExpertIsRefusedByName) {
  SlotCache cache = make_cache(2);
  (void)cache.begin_load(key(0), SlotCache::Purpose::kHint);
  EXPECT_EQ(refusal(cache.begin_load(key(0), SlotCache::Purpose::kDemand)), Refusal::kLoading);
  cache.finish_load(key(0));
  EXPECT_EQ(refusal(cache.begin_load(key(0), SlotCache::Purpose::kDemand)), Refusal::kResident);
}

TEST(SlotCache, AHintMayBeDeclinedAndThenChangesNothing) {
  SlotCache cache = make_cache(1, "static");
  (void)load(cache, key(0));
  EXPECT_EQ(refusal(cache.begin_load(key(1), SlotCache::Purpose::kHint)), Refusal::kDeclined);
  EXPECT_EQ(cache.state(key(0)), SlotState::kReady);
  EXPECT_TRUE(
      std::holds_alternative<SlotIdx>(cache.begin_load(key(1), SlotCache::Purpose::kDemand)));
}

TEST(SlotCache, AHintTakesAnEmptySlotWithoutAsking) {
  SlotCache cache = make_cache(2, "static");
  (void)load(cache, key(0));
  EXPECT_TRUE(std::holds_alternative<SlotIdx>(cache.begin_load(key(1), SlotCache::Purpose::kHint)));
}

TEST(SlotCache, APinnedLoadUsesItsSlotOrNone) {
  SlotCache cache = make_cache(3);
  EXPECT_EQ(std::get<SlotIdx>(cache.begin_load(key(0), SlotCache::Purpose::kDemand, SlotIdx{2})),
            SlotIdx{2});
  EXPECT_EQ(refusal(cache.begin_load(key(1), SlotCache::Purpose::kDemand, SlotIdx{2})),
            Refusal::kLeased)
      << "two slots are empty, but not this one";
  cache.finish_load(key(0));
  EXPECT_EQ(std::get<SlotIdx>(cache.begin_load(key(1), SlotCache::Purpose::kDemand, SlotIdx{2})),
            SlotIdx{2});
  EXPECT_EQ(cache.state(key(0)), SlotState::kEmpty);
  for (const std::int32_t wrong : {-1, 3, INT_MAX, INT_MIN})
    EXPECT_THROW((void)cache.begin_load(key(5), SlotCache::Purpose::kDemand, SlotIdx{wrong}),
                 InternalError);
}

TEST(SlotCache, LeasesAreCountedAndReturnThemselves) {
  SlotCache cache = make_cache(1);
  (void)load(cache, key(0));
  {
    SlotLease first = *cache.find(key(0));
    SlotLease second = *cache.find(key(0));
    EXPECT_EQ(cache.num_leases(), 2);
    const SlotLease moved = std::move(first);
    EXPECT_FALSE(static_cast<bool>(first));  // NOLINT(bugprone-use-after-move)
    EXPECT_EQ(cache.num_leases(), 2);
    second = SlotLease();
    EXPECT_EQ(cache.num_leases(), 1);
    EXPECT_EQ(cache.snapshot()[0].leases, 1);
  }
  EXPECT_EQ(cache.num_leases(), 0);
}

TEST(SlotCache, EvictAllKeepsWhatIsLeasedOrLoading) {
  SlotCache cache = make_cache(3);
  (void)load(cache, key(0));
  (void)load(cache, key(1));
  (void)cache.begin_load(key(2), SlotCache::Purpose::kDemand);
  const std::optional<SlotLease> lease = cache.find(key(1));
  EXPECT_EQ(cache.evict_all(), 1);
  EXPECT_EQ(cache.state(key(0)), SlotState::kEmpty);
  EXPECT_EQ(cache.state(key(1)), SlotState::kReady);
  EXPECT_EQ(cache.state(key(2)), SlotState::kLoading);
}

TEST(SlotCache, AMoveThatNoTransitionAllowsIsAnInternalError) {
  SlotCache cache = make_cache(1);
  EXPECT_THROW(cache.finish_load(key(0)), InternalError);
  EXPECT_THROW(cache.fail_load(key(0)), InternalError);
  (void)load(cache, key(0));
  try {
    cache.finish_load(key(0));
    FAIL() << "a ready expert was finished again";
  } catch (const InternalError& error) {
    EXPECT_THAT(error.what(), HasSubstr("finish_load: got layer 0 expert 0, which is ready"));
  }
  EXPECT_THROW(cache.fail_load(key(0)), InternalError);
  EXPECT_EQ(cache.state(key(0)), SlotState::kReady);
}

TEST(SlotCache, HoldsAtLeastOneSlot) {
  EXPECT_THROW(make_cache(0), CapacityError);
  EXPECT_THROW(make_cache(-3), CapacityError);
}

TEST(SlotCache, TrimEvictsAsThePolicySaysAndNoLeasedExpert) {
  SlotCache cache = make_cache(4);
  for (int i = 0; i < 4; ++i) (void)load(cache, key(i));
  std::optional<SlotLease> oldest = cache.find(key(0));
  EXPECT_EQ(cache.trim(2), 2);
  EXPECT_EQ(cache.state(key(0)), SlotState::kReady);
  EXPECT_EQ(cache.state(key(3)), SlotState::kReady);
  std::optional<SlotLease> newest = cache.find(key(3));
  EXPECT_EQ(cache.trim(0), 0) << "all are leased";
  newest->reset();
  EXPECT_EQ(cache.trim(2), 0);
}

TEST(SlotCache, TouchingDecidesWhoLeaves) {
  SlotCache cache = make_cache(2);
  (void)load(cache, key(0));
  (void)load(cache, key(1));
  touch(cache, 0, {0});
  EXPECT_EQ(load(cache, key(2)), SlotIdx{1});
}

/// A policy that answers nonsense: the cache must say so, not write past its candidates.
class OutOfRangePolicy final : public Policy {
 public:
  void on_event(const CacheEvent& /*event*/) override {}
  [[nodiscard]] std::size_t victim(std::span<const Candidate> candidates) override {
    return candidates.size();
  }
};

TEST(SlotCache, APolicyThatNamesNoCandidateIsAnInternalError) {
  SlotCache cache(1, std::make_unique<OutOfRangePolicy>());
  (void)load(cache, key(0));
  EXPECT_THROW((void)cache.begin_load(key(1), SlotCache::Purpose::kDemand), InternalError);
  EXPECT_EQ(cache.state(key(0)), SlotState::kReady);
}

}  // namespace
}  // namespace sluice
