// Locks, clocks, byte arithmetic and the expert layout: small values that everything stands on.
#include <gtest/gtest.h>

#include <limits>
#include <thread>

#include "base/bytes.h"
#include "base/clock.h"
#include "base/expert_layout.h"
#include "base/mutex.h"

namespace sluice {
namespace {

TEST(CondVar, AWaiterIsWokenByANotification) {
  Mutex mu;
  CondVar cv;
  bool ready = false;
  std::thread waker([&] {
    MutexLock lock(mu);
    ready = true;
    cv.notify_one();
  });
  {
    MutexLock lock(mu);
    while (!ready) cv.wait(mu);
  }
  waker.join();
  EXPECT_TRUE(ready);
}

TEST(CondVar, ATimedWaitEndsWithoutANotification) {
  Mutex mu;
  CondVar cv;
  MutexLock lock(mu);
  cv.wait_for(mu, std::chrono::milliseconds(1));
}

TEST(Clock, TheSteadyClockNeverGoesBack) {
  const SteadyClock clock;
  Nanos last = clock.now();
  for (int i = 0; i < 1000; ++i) {
    const Nanos now = clock.now();
    ASSERT_GE(now, last);
    last = now;
  }
}

TEST(Clock, TheVirtualClockMovesWhenTold) {
  VirtualClock clock;
  EXPECT_EQ(clock.now(), 0);
  clock.advance(5);
  clock.advance(7);
  EXPECT_EQ(clock.now(), 12);
}

TEST(Bytes, AlignmentRoundsBothWays) {
  EXPECT_EQ(align_up(0, 64), 0u);
  EXPECT_EQ(align_up(1, 64), 64u);
  EXPECT_EQ(align_up(64, 64), 64u);
  EXPECT_EQ(align_down(127, 64), 64u);
}

TEST(Bytes, CheckedArithmeticIsEmptyOnOverflow) {
  constexpr auto kMax = std::numeric_limits<std::uint64_t>::max();
  EXPECT_EQ(checked_add(kMax - 1, 1), kMax);
  EXPECT_FALSE(checked_add(kMax, 1).has_value());
  EXPECT_EQ(checked_mul(kMax, 1), kMax);
  EXPECT_FALSE(checked_mul(kMax / 2, 3).has_value());
}

TEST(ExpertLayout, SectionsFollowEachOtherOnLines) {
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    for (const bool gated : {false, true}) {
      for (const bool has_bias : {false, true}) {
        for (const std::int64_t hidden : {1, 3, 64, 100}) {
          const ExpertLayout layout{.dtype = dtype,
                                    .hidden = hidden,
                                    .intermediate = 7,
                                    .gated = gated,
                                    .has_bias = has_bias};
          EXPECT_EQ(layout.w13_rows(), gated ? 14 : 7);
          EXPECT_EQ(layout.w2_offset() % kSlotAlignment, 0u);
          EXPECT_GE(layout.w2_offset(), layout.w13_bytes());
          EXPECT_LT(layout.w2_offset() - layout.w13_bytes(), kSlotAlignment);
          EXPECT_EQ(layout.b13_offset() % kSlotAlignment, 0u);
          EXPECT_GE(layout.b13_offset(), layout.w2_offset() + layout.w2_bytes());
          EXPECT_EQ(layout.b2_offset() % kSlotAlignment, 0u);
          EXPECT_GE(layout.b2_offset(),
                    layout.b13_offset() + static_cast<std::size_t>(layout.w13_rows()) * 4);
          EXPECT_EQ(layout.bytes(), has_bias
                                        ? layout.b2_offset() + static_cast<std::size_t>(hidden) * 4
                                        : layout.w2_offset() + layout.w2_bytes());
        }
      }
    }
  }
}

TEST(ExpertLayout, AMixtralExpertTakesWhatItsMatricesTake) {
  const ExpertLayout layout{
      .dtype = DType::kBF16, .hidden = 4096, .intermediate = 14336, .gated = true};
  EXPECT_EQ(layout.bytes(), std::size_t{3} * 4096 * 14336 * 2);
}

}  // namespace
}  // namespace sluice
