#include "predict/pending_tokens.h"

#include <gtest/gtest.h>

#include <vector>

namespace sluice {
namespace {

TEST(PendingTokens, TellsHowSoonExpertsCameBack) {
  PendingTokens pending(3, 1, 4, 2);
  const std::vector<std::vector<std::int16_t>> routes{{0, 1}, {1, 2}, {2, -1}, {0, 3}};
  for (const auto& each : routes) {
    ASSERT_FALSE(pending.is_full());
    pending.push(each);
  }
  ASSERT_TRUE(pending.is_full());
  const auto as_vector = [](auto span) { return std::vector(span.begin(), span.end()); };
  EXPECT_EQ(as_vector(pending.oldest_routes()), routes[0]);
  EXPECT_EQ(as_vector(pending.oldest_next_uses()), (std::vector<std::uint8_t>{3, 1, 1, 3}));
  pending.pop();
  EXPECT_EQ(as_vector(pending.oldest_routes()), routes[1]);
  EXPECT_EQ(as_vector(pending.oldest_next_uses()), (std::vector<std::uint8_t>{2, 0, 1, 2}));
  pending.push(routes[1]);  // around the end of the ring
  EXPECT_EQ(as_vector(pending.oldest_next_uses()), (std::vector<std::uint8_t>{2, 3, 1, 2}));
  EXPECT_EQ(pending.size(), 4u);
}

}  // namespace
}  // namespace sluice
