#include "base/log_ring.h"

#include <gtest/gtest.h>

#include <thread>

namespace sluice {
namespace {

TEST(LogRing, RecordsComeOutOnceInOrder) {
  LogRing ring(8);
  ring.log(LogLevel::kInfo, "one");
  ring.log(LogLevel::kError, "two");
  const auto records = ring.drain();
  ASSERT_EQ(records.size(), 2u);
  EXPECT_EQ(records[0].text, "one");
  EXPECT_EQ(records[0].level, LogLevel::kInfo);
  EXPECT_EQ(records[1].text, "two");
  EXPECT_EQ(records[1].level, LogLevel::kError);
  EXPECT_LE(records[0].time, records[1].time);
  EXPECT_TRUE(ring.drain().empty());
  EXPECT_EQ(ring.lost(), 0u);
}

TEST(LogRing, AFullRingLosesItsOldestAndCountsThem) {
  LogRing ring(3);
  for (int i = 0; i < 5; ++i) ring.log(LogLevel::kInfo, std::to_string(i));
  const auto records = ring.drain();
  ASSERT_EQ(records.size(), 3u);
  EXPECT_EQ(records[0].text, "2");
  EXPECT_EQ(records[2].text, "4");
  EXPECT_EQ(ring.lost(), 2u);
}

TEST(LogRing, AnEmptyRingStillHoldsOneRecord) {
  LogRing ring(0);
  ring.log(LogLevel::kInfo, "a");
  ring.log(LogLevel::kInfo, "b");
  EXPECT_EQ(ring.drain().at(0).text, "b");
}

TEST(LogRing, LongTextsAreCut) {
  LogRing ring(2);
  ring.log(LogLevel::kInfo, std::string(10'000, 'x'));
  EXPECT_EQ(ring.drain().at(0).text, std::string(LogRing::kMaxText, 'x'));
}

TEST(LogRing, WritersAndADrainMeetWithoutLosingCount) {
  LogRing ring(16);
  constexpr int kWriters = 3;
  constexpr int kRecords = 2000;
  std::vector<std::thread> writers;
  for (int w = 0; w < kWriters; ++w) {
    writers.emplace_back([&] {
      for (int i = 0; i < kRecords; ++i) ring.log(LogLevel::kInfo, "record");
    });
  }
  std::size_t drained = 0;
  for (int i = 0; i < 200; ++i) drained += ring.drain().size();
  for (std::thread& writer : writers) writer.join();
  drained += ring.drain().size();
  EXPECT_EQ(drained + ring.lost(), std::size_t{kWriters} * kRecords);
}

TEST(LogRing, TheProcessHasOne) { EXPECT_EQ(&log_ring(), &log_ring()); }

}  // namespace
}  // namespace sluice
