#include "engine/grouping.h"

#include <gtest/gtest.h>

#include <cmath>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace sluice {
namespace {

struct GroupingTest : ::testing::Test {
  std::vector<std::int64_t> ids;
  std::vector<float> weights;
  Grouping grouping;

  void assign(std::int64_t tokens, std::int64_t top_k, std::int32_t num_experts) {
    ForwardArgs args{.num_tokens = tokens, .top_k = top_k};
    args.expert_ids = ids.data();
    args.weights = weights.data();
    grouping.assign(args, num_experts);
  }
  [[nodiscard]] std::vector<std::int64_t> rows(std::size_t group) const {
    const auto span = grouping.rows_of(grouping.groups()[group]);
    return {span.begin(), span.end()};
  }
};

TEST_F(GroupingTest, CollectsEachExpertsRowsInOrder) {
  ids = {3, 1, 1, 3, 0, 3};
  weights.assign(6, 0.5f);
  assign(3, 2, 4);
  ASSERT_EQ(grouping.groups().size(), 3u);
  EXPECT_EQ(grouping.groups()[0].expert, 0);
  EXPECT_EQ(rows(0), (std::vector<std::int64_t>{4}));
  EXPECT_EQ(rows(1), (std::vector<std::int64_t>{1, 2}));
  EXPECT_EQ(rows(2), (std::vector<std::int64_t>{0, 3, 5}));
}

TEST_F(GroupingTest, SentinelsNegativeIdsAndZeroWeightsAskForNothing) {
  ids = {4, -1, 1, 2, INT64_MAX, INT64_MIN};
  weights = {0.5f, 0.5f, 0.0f, -0.0f, 1.0f, 1.0f};
  assign(2, 3, 4);
  EXPECT_TRUE(grouping.groups().empty());
  for (int i = 0; i < 6; ++i) EXPECT_EQ(grouping.valid()[i], 0);
}

TEST_F(GroupingTest, AWeightThatIsNoNumberIsARow) {
  ids = {1};
  weights = {std::nanf("")};
  assign(1, 1, 2);
  EXPECT_EQ(grouping.groups().size(), 1u);
}

#if defined(__x86_64__)
TEST_F(GroupingTest, ASubnormalWeightIsARowAlsoOfACallerThatFlushesThem) {
  ids = {1, 0, 1};
  weights = {1e-40f, -1e-45f, 0.0f};
  const unsigned saved = _mm_getcsr();
  _mm_setcsr(saved | 0x8040);  // flush to zero, denormals are zero
  assign(3, 1, 2);
  _mm_setcsr(saved);
  ASSERT_EQ(grouping.groups().size(), 2u);
  EXPECT_EQ(rows(0), (std::vector<std::int64_t>{1}));
  EXPECT_EQ(rows(1), (std::vector<std::int64_t>{0}));
}
#endif

TEST_F(GroupingTest, NoTokensAndNoExpertsPerTokenAreNoGroups) {
  assign(0, 4, 8);
  EXPECT_TRUE(grouping.groups().empty());
  assign(4, 0, 8);
  EXPECT_TRUE(grouping.groups().empty());
}

TEST_F(GroupingTest, ForgetsTheCallBefore) {
  ids = {0, 1, 2, 3};
  weights.assign(4, 1.0f);
  assign(2, 2, 4);
  ids = {2};
  assign(1, 1, 4);
  ASSERT_EQ(grouping.groups().size(), 1u);
  EXPECT_EQ(grouping.groups()[0].expert, 2);
  EXPECT_EQ(rows(0), (std::vector<std::int64_t>{0}));
}

}  // namespace
}  // namespace sluice
