#include "kernels/route.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>

#include "base/error.h"
#include "engine/forward.h"
#include "engine/grouping.h"
#include "tests/emulation/kernels/device_array.h"

namespace sluice {
namespace {

using namespace testing;  // NOLINT: the test support of this folder

struct Entries {
  std::int64_t num_tokens = 0;
  std::int64_t top_k = 1;
  std::int32_t num_experts = 1;
  DType weights = DType::kF32;
  std::vector<std::int64_t> ids;
  std::vector<std::byte> weight_bytes;
};

/// Ids of every kind: mostly experts, some outside of [0, E) on either side; weights of which some
/// are zero, of either sign, subnormal or NaN.
Entries draw_entries(std::int64_t num_tokens, std::int64_t top_k, std::int32_t num_experts,
                     DType dtype, std::mt19937& random) {
  Entries e{.num_tokens = num_tokens,
            .top_k = top_k,
            .num_experts = num_experts,
            .weights = dtype,
            .ids = {},
            .weight_bytes = {}};
  std::vector<float> weights;
  const auto busy = 1 + random() % static_cast<unsigned>(num_experts);  // the others stay empty
  for (std::int64_t i = 0; i < num_tokens * top_k; ++i) {
    constexpr std::int64_t kOdd[] = {-1, -257, std::numeric_limits<std::int64_t>::min(),
                                     std::numeric_limits<std::int64_t>::max(),
                                     std::int64_t{1} << 32};
    const auto draw = random() % 16;
    if (draw == 0) {
      e.ids.push_back(kOdd[random() % std::size(kOdd)]);
    } else if (draw == 1) {
      e.ids.push_back(num_experts + static_cast<std::int64_t>(random() % 3));
    } else {
      e.ids.push_back(static_cast<std::int64_t>(random() % busy));
    }
    const float smallest = dtype == DType::kF16 ? 0x1p-24f : 0x1p-133f;
    const float kOddWeights[] = {0.0f, -0.0f, smallest, -smallest, std::nanf("")};
    weights.push_back(random() % 8 == 0 ? kOddWeights[random() % 5]
                                        : static_cast<float>(random() % 1000) / 1000);
  }
  e.weight_bytes = encode(dtype, weights);
  return e;
}

void check_against_grouping(const Entries& e, StreamHandle stream) {
  Grouping grouping;
  ForwardArgs args;
  args.num_tokens = e.num_tokens;
  args.top_k = e.top_k;
  args.expert_ids = e.ids.data();
  args.weights_dtype = e.weights;
  args.weights = e.weight_bytes.data();
  grouping.assign(args, e.num_experts);
  std::vector<std::int32_t> offsets(static_cast<std::size_t>(e.num_experts) + 1, 0);
  std::vector<std::int32_t> rows;
  for (const Grouping::Group& group : grouping.groups()) {
    offsets[static_cast<std::size_t>(group.expert) + 1] = static_cast<std::int32_t>(group.count);
    for (const std::int64_t row : grouping.rows_of(group)) {
      rows.push_back(static_cast<std::int32_t>(row));
    }
  }
  for (std::size_t i = 1; i < offsets.size(); ++i) offsets[i] += offsets[i - 1];

  const DeviceArray<std::int64_t> ids(e.ids);
  const DeviceArray<std::byte> weights(e.weight_bytes);
  const DeviceArray<std::int32_t> offsets_device(offsets.size());
  const DeviceArray<std::int32_t> rows_device(e.ids.size());
  const RouteProblem problem{.num_tokens = e.num_tokens,
                             .top_k = e.top_k,
                             .num_experts = e.num_experts,
                             .weights = e.weights};
  launch_route(problem, plan_route(problem),
               {.ids = ids.data(),
                .weights = weights.data(),
                .offsets = offsets_device.data(),
                .rows = rows_device.data()},
               stream);
  ASSERT_EQ(offsets_device.read(), offsets);
  std::vector<std::int32_t> got = rows_device.read();
  for (std::size_t i = rows.size(); i < got.size(); ++i) {
    ASSERT_EQ(got[i], -1) << "row " << i << " of " << rows.size() << " was written";
  }
  got.resize(rows.size());
  ASSERT_EQ(got, rows);
}

TEST(Route, GivesTheOrderOfTheHostForEveryCountOfEntriesAndExperts) {
  std::size_t i = 0;
  for (int seed = 0; seed < num_seeds(); ++seed) {
    std::mt19937 random(static_cast<unsigned>(31 + seed));
    for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
      for (const std::int64_t tokens : {0, 1, 2, 5, 31, 32, 33, 64, 200}) {
        for (const std::int32_t experts : {1, 2, 8, 60, 128, 256, 257}) {
          schedule(i++).set_up();
          const Stream stream(i % 2 == 0);
          const auto top_k = static_cast<std::int64_t>(1 + random() % 8);
          const Entries e = draw_entries(tokens, top_k, experts, dtype, random);
          ASSERT_NO_FATAL_FAILURE(check_against_grouping(e, stream.handle()))
              << tokens << " tokens of " << top_k << ", " << experts << " experts";
        }
      }
    }
  }
}

TEST(Route, PassesOverLargeBatchesAndManyExperts) {
  std::mt19937 random(32);
  Schedule{.order = simt::Order::kSkew, .policy = fake::Policy::kLazy}.set_up();
  ASSERT_NO_FATAL_FAILURE(
      check_against_grouping(draw_entries(2000, 8, 128, DType::kBF16, random), {}));
  ASSERT_NO_FATAL_FAILURE(
      check_against_grouping(draw_entries(64, 8, 4096, DType::kF32, random), {}));
}

TEST(Route, TakesAMillionEntriesInTheLongRun) {
  if (num_seeds() == 1) GTEST_SKIP() << "SLUICE_TEST_SEEDS is 1";
  std::mt19937 random(34);
  Schedule{}.set_up();
  ASSERT_NO_FATAL_FAILURE(
      check_against_grouping(draw_entries(1 << 17, 8, 384, DType::kBF16, random), {}));
}

TEST(Route, ExpertsAtTheEdgesOfAPassAreInOne) {
  std::mt19937 random(33);
  Schedule{.order = simt::Order::kRandom}.set_up();
  Entries e = draw_entries(100, 4, 600, DType::kF32, random);
  constexpr std::int64_t kEdges[] = {0, 255, 256, 257, 511, 512, 513, 599};
  for (std::int64_t& id : e.ids) id = kEdges[random() % std::size(kEdges)];
  ASSERT_NO_FATAL_FAILURE(check_against_grouping(e, {}));
}

TEST(Route, APlanGivesEveryEntryAWarpAndEveryExpertAPass) {
  for (const std::int64_t tokens : {0, 1, 3, 100, 4096, 131'072}) {
    for (const std::int64_t top_k : {1, 6, 8}) {
      for (const std::int32_t experts : {1, 2, 255, 256, 257, 4096}) {
        const RoutePlan plan =
            plan_route({.num_tokens = tokens, .top_k = top_k, .num_experts = experts});
        SCOPED_TRACE(plan.text());
        EXPECT_GE(std::int64_t{plan.warps} * plan.entries_per_warp, tokens * top_k);
        EXPECT_EQ(plan.entries_per_warp % 32, 0);
        EXPECT_TRUE(plan.warps >= 1 && plan.warps <= 32);
        EXPECT_GE(plan.passes * kRouteExpertsPerPass, experts);
        EXPECT_GE(1 << plan.key_bits, std::min(experts, kRouteExpertsPerPass));
      }
    }
  }
  EXPECT_EQ(plan_route({.num_tokens = 1, .top_k = 8, .num_experts = 128}).text(),
            "1 warps of 32 entries, 1 passes, 7 key bits");
  EXPECT_THROW((void)plan_route({.num_tokens = 1, .top_k = 1, .num_experts = 0}), ConfigError);
  EXPECT_THROW((void)plan_route({.num_tokens = 1 << 30, .top_k = 2, .num_experts = 8}),
               ConfigError);
}

}  // namespace
}  // namespace sluice
