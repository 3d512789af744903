#include "engine/timeline.h"

#include <gtest/gtest.h>

namespace sluice {
namespace {

TEST(Timeline, KeepsTheNewestSpansOldestFirst) {
  Timeline timeline(3);
  for (Nanos begin = 1; begin <= 5; ++begin) timeline.add({.begin = begin, .end = begin + 1});
  const std::vector<Span> spans = timeline.snapshot();
  ASSERT_EQ(spans.size(), 3u);
  EXPECT_EQ(spans[0].begin, 3);
  EXPECT_EQ(spans[2].begin, 5);
}

TEST(Timeline, WithoutRoomRecordsNothing) {
  Timeline timeline(0);
  timeline.add({.begin = 1, .end = 2});
  EXPECT_TRUE(timeline.snapshot().empty());
}

}  // namespace
}  // namespace sluice
