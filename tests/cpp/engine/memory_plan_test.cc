#include "engine/memory_plan.h"

#include <gtest/gtest.h>

#include <random>
#include <string>

#include "base/error.h"
#include "support/seed.h"

namespace sluice {
namespace {

TEST(MemoryPlan, RoundsDownToWholeSlots) {
  const LayerBytes layers[] = {{.slot_bytes = 64, .num_experts = 8},
                               {.slot_bytes = 64, .num_experts = 8}};
  const MemoryPlan plan = plan_memory(64 * 5 + 63, layers);
  ASSERT_EQ(plan.classes.size(), 1u);
  EXPECT_EQ(plan.classes[0].num_slots, 5);
  EXPECT_EQ(plan.classes[0].num_experts, 16);
  EXPECT_EQ(plan.slab_bytes, 64u * 5);
  EXPECT_EQ(plan.class_of_layer, (std::vector<std::int32_t>{0, 0}));
}

TEST(MemoryPlan, NoClassGetsMoreSlotsThanExperts) {
  const LayerBytes layers[] = {{.slot_bytes = 64, .num_experts = 4},
                               {.slot_bytes = 128, .num_experts = 2}};
  const MemoryPlan plan = plan_memory(UINT64_MAX, layers);
  EXPECT_EQ(plan.classes[0].num_slots, 4);
  EXPECT_EQ(plan.classes[1].num_slots, 2);
  EXPECT_EQ(plan.slab_bytes, 64u * 4 + 128u * 2);
}

TEST(MemoryPlan, SharesSlotsInProportionToTheExpertBytesOfTheClasses) {
  const LayerBytes layers[] = {{.slot_bytes = 64, .num_experts = 100},
                               {.slot_bytes = 256, .num_experts = 100}};
  const MemoryPlan plan = plan_memory(320 * 50, layers);
  EXPECT_NEAR(plan.classes[0].num_slots, 50, 1);
  EXPECT_NEAR(plan.classes[1].num_slots, 50, 1);
}

TEST(MemoryPlan, ClassesWithoutExpertsInSlotsGetNone) {
  const LayerBytes layers[] = {{.slot_bytes = 64, .num_experts = 0}};
  EXPECT_EQ(plan_memory(0, layers).slab_bytes, 0u);
}

TEST(MemoryPlan, TooSmallABudgetNamesThoseThatWork) {
  const LayerBytes layers[] = {{.slot_bytes = 64, .num_experts = 8},
                               {.slot_bytes = 128, .num_experts = 4}};
  try {
    (void)plan_memory(191, layers);
    FAIL() << "expected CapacityError";
  } catch (const CapacityError& error) {
    const std::string text = error.what();
    EXPECT_NE(text.find("got 191 bytes"), std::string::npos) << text;
    EXPECT_NE(text.find("192 (one slot)"), std::string::npos) << text;
    EXPECT_NE(text.find("384 (two, copies overlap)"), std::string::npos) << text;
    EXPECT_NE(text.find("1024 (one layer at once)"), std::string::npos) << text;
    EXPECT_NE(text.find("1024 (all experts)"), std::string::npos) << text;
  }
  EXPECT_EQ(plan_memory(192, layers).slab_bytes, 192u);
}

TEST(MemoryPlan, TheNamedBudgetForOneLayerHoldsOne) {
  std::mt19937_64 rng(testing::test_seed());
  for (int i = 0; i < 200; ++i) {
    std::vector<LayerBytes> layers;
    for (std::uint64_t l = 0; l < 1 + rng() % 4; ++l) {
      layers.push_back({.slot_bytes = 64 * (1 + rng() % 5),
                        .num_experts = static_cast<std::int32_t>(1 + rng() % 20)});
    }
    std::uint64_t one_layer = 0;
    try {
      (void)plan_memory(0, layers);
    } catch (const CapacityError& error) {
      const std::string text = error.what();
      const std::size_t end = text.find(" (one layer at once)");
      one_layer = std::stoull(text.substr(text.rfind(' ', end - 1) + 1));
    }
    const MemoryPlan plan = plan_memory(one_layer, layers);
    EXPECT_LE(plan.slab_bytes, one_layer);
    for (std::size_t l = 0; l < layers.size(); ++l) {
      EXPECT_GE(plan.classes[static_cast<std::size_t>(plan.class_of_layer[l])].num_slots,
                layers[l].num_experts);
    }
  }
}

TEST(MemoryPlan, NeverExceedsItsBudgetAndWastesLessThanOneSlot) {
  std::mt19937_64 rng(testing::test_seed());
  for (int i = 0; i < 500; ++i) {
    std::vector<LayerBytes> layers;
    std::uint64_t all = 0;
    std::uint64_t least = 0;
    std::uint64_t largest = 0;
    for (std::uint64_t l = 0; l < 1 + rng() % 4; ++l) {
      layers.push_back({.slot_bytes = 64 * (1 + rng() % 5),
                        .num_experts = static_cast<std::int32_t>(1 + rng() % 20)});
      all += layers.back().slot_bytes * static_cast<std::uint64_t>(layers.back().num_experts);
      least += layers.back().slot_bytes;
      largest = std::max<std::uint64_t>(largest, layers.back().slot_bytes);
    }
    const std::uint64_t budget = least + rng() % (all + 1);
    const MemoryPlan plan = plan_memory(budget, layers);
    EXPECT_LE(plan.slab_bytes, budget);
    EXPECT_TRUE(plan.slab_bytes == all || plan.slab_bytes + largest > budget);
  }
}

}  // namespace
}  // namespace sluice
