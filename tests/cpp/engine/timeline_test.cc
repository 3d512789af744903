#include "engine/timeline.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace sluice {
namespace {

class NotedRanges final : public Ranges {
 public:
  void push(const char* name) noexcept override { notes.push_back("push " + std::string(name)); }
  void pop() noexcept override { notes.emplace_back("pop"); }
  std::uint64_t start(const char* name) noexcept override {
    notes.push_back("start " + std::string(name));
    return 40 + notes.size();
  }
  void end(std::uint64_t range) noexcept override {
    notes.push_back("end " + std::to_string(range));
  }

  std::vector<std::string> notes;
};

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

TEST(Timeline, ShowsSpansWhileTheyLastUnderTheNamesOfATrace) {
  NotedRanges ranges;
  Timeline timeline(0, &ranges);
  const std::uint64_t load = timeline.show(SpanKind::kLoadDemand, make_key(3, 5));
  {
    const Timeline::Shown forward(timeline, SpanKind::kForward, make_key(3, -1));
    const Timeline::Shown compute(timeline, SpanKind::kCompute, make_key(3, 127));
    timeline.hide(load);
  }
  EXPECT_EQ(ranges.notes,
            (std::vector<std::string>{"start load demand layer 3 expert 5", "push forward layer 3",
                                      "push compute layer 3 expert 127", "end 41", "pop", "pop"}));
}

TEST(Timeline, WithoutRangesShowsNothing) {
  Timeline timeline(4);
  EXPECT_EQ(timeline.show(SpanKind::kLoadHint, make_key(0, 0)), 0u);
  timeline.hide(0);
  const Timeline::Shown shown(timeline, SpanKind::kStall, make_key(0, -1));
  EXPECT_TRUE(timeline.snapshot().empty());
}

}  // namespace
}  // namespace sluice
